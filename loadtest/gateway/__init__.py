"""Programs that measure the gateway: its cost, and what it does under overload, attack and crashes."""
