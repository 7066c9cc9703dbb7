"""Foreign checkpoints made ours: what lies in a file, which architecture it is, and a checkpoint directory of it."""

from modeling.importing.importer import Imported, import_checkpoint

__all__ = ["Imported", "import_checkpoint"]
