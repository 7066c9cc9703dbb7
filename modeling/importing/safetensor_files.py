"""Files of safetensors, opened without reading their tensors."""

from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from modeling.importing.weights import Stored, Weights

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip


def read(path: Path) -> Weights:
    """The tensors of a file, mapped.

    ``safetensors.torch.save_model`` keeps one of several tied tensors and writes the other names into the metadata:
    they are the result's aliases.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        file = safe_open(path, framework="pt")
        names, metadata = list(file.keys()), file.metadata() or {}
        stored = {}
        for name in names:
            view = file.get_slice(name)
            dtype = DTYPES.get(view.get_dtype())
            if dtype is None:
                hint = ""
                if f"{name}_scale_inv" in names:  # DeepSeek's blocks of 128 x 128, each with a factor
                    hint = f" (each block times its factor in {name}_scale_inv, as the model's publisher says how)"
                raise ValueError(
                    f"{path}: {name} is {view.get_dtype()}, a quantised or unusual format: save the weights in "
                    f"float32, bfloat16 or float16{hint}"
                )
            shape = tuple(view.get_shape())
            stored[name] = Stored(name, shape, dtype, path, partial(file.get_tensor, name), True)
    except (SafetensorError, RuntimeError, OverflowError, MemoryError) as e:
        raise ValueError(f"{path} is damaged or no safetensors file ({' '.join(str(e).split())[:200]})") from None
    if not stored:
        raise ValueError(f"{path} holds no tensors")
    aliases = {other: name for other, name in metadata.items() if name in stored and other not in stored}
    return Weights("safetensors", (path,), stored, aliases)
