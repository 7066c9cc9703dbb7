"""The ``medassist`` command, questions from the terminal, and the demo. Needs neither torch nor vllm."""
