"""From a directory or hub id to a model with its weights: every parameter exactly once, or an error that names it.

New weights for a running model take the same way, by the checkpoint's names. The loader writes them over the old ones:
on a GPU parameters keep their addresses, because captured graphs hold those.
"""

from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nanovllm.config import Config
from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.models.sharded_state import load_shard
from nanovllm.models.tied_head import EMBEDDING, HEAD, TiedHead
from nanovllm.models.weight_files import read_tensors, text_name

NamedTensors = Iterable[tuple[str, torch.Tensor]]
Shard = str | int | tuple | None
Place = tuple[str, str, Shard]  # module, its parameter, shard of it
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # of a checkpoint's numbers


def load_weights(model: nn.Module, path: Path) -> None:
    """Fill `model` from the directory's safetensors, one file or several with an index, or from a GGUF file.

    Raises:
        FileNotFoundError: no weights, or a file of the index is missing; OSError: a file is damaged.
        ValueError: naming a tensor that is missing, unexpected, there twice, or of the wrong shape or dtype.
    """
    places = tensor_places(model)
    loaded: set[str] = set()
    dtype = next(model.parameters()).dtype
    _fill(model, places, read_tensors(path, dtype=dtype), loaded, f" in {path}")
    missing = places.keys() - loaded
    if missing:
        raise ValueError(f"tensors missing in {path}: {list_names(missing)}")


def checked_tensors(outline: nn.Module, named_tensors: NamedTensors, tied_head: TiedHead | None = None) -> NamedTensors:
    """Yields each tensor after checking that it belongs to this model.

    It skips redundant ones (a tied head, rotary buffers), and all but the text part of a model that sees images too.

    Args:
        outline: the whole model without memory, as one rank would have it.
        tied_head: compares the head's tensor with the embedding, where the model has no head of its own.

    Raises:
        TypeError: an entry is not a name and a tensor.
        ValueError: naming a tensor that is unexpected, there twice, or of the wrong shape or dtype; at the end, naming
            a head that should equal the embedding and does not.
    """
    places = tensor_places(outline)
    if tied_head is not None:
        places[HEAD] = places[EMBEDDING]
        tied_head.begin()
    seen: set[str] = set()
    for whole_name, tensor in _pairs(named_tensors):
        if (name := text_name(whole_name)) is None:
            continue
        _fill(outline, places, [(name, torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"))], seen)
        if tied_head is not None:
            tied_head.see(name, tensor)
        if name in seen and (name != HEAD or tied_head is None):
            yield name, tensor
    if tied_head is not None:
        tied_head.end()


def update_weights(model: nn.Module, outline: nn.Module, named_tensors: NamedTensors, loaded: set[str]) -> None:
    """Write tensors, all of a checkpoint's or some, over the weights of a running model.

    When one is faulty, the tensors before it have been written. A layer whose weight is laid out for its product has
    the checkpoint's layout from the first tensor for it until this returns.

    Args:
        outline: the same model without memory.
        loaded: receives the names of the tensors that have been written.

    Raises: what `named_tensors` raises; ValueError for a tensor of the wrong shape.
    """
    laid_out = [layer for layer in _formatted(model) if layer.format.is_laid_out]
    try:
        _fill(model, tensor_places(outline), named_tensors, loaded)
    except Exception as error:
        error.add_note(f"{len(loaded)} tensors had been loaded before: {list_names(loaded)}")
        raise
    finally:
        for layer in laid_out:
            layer.format.lay_out(layer)


def fill_with_random_weights(model: nn.Module, seed: int = 0) -> None:
    """Random weights of a trained model's scale, for benchmarks of a config without a checkpoint."""
    device = next(model.parameters()).device
    generator = torch.Generator(device=device).manual_seed(seed)
    # A CPU takes seconds to draw a billion numbers, so a million are repeated. Their number is prime: otherwise rows of
    # a matrix, and with them the logits of two tokens, could be equal.
    numbers = torch.empty(1_048_583, device=device).uniform_(-0.035, 0.035, generator=generator)  # deviation 0.02
    for name, param in model.named_parameters():
        if name.endswith("norm.weight"):
            param.data.fill_(1.0)
        else:
            for run in param.data.view(-1).split(len(numbers)):
                run.copy_(numbers[: len(run)])


def build_model(
    config: Config,
    hf_config: Any,
    cls: type,
    path: Path,
    dtype: torch.dtype,
    device: str,
    tp: TensorParallel = TensorParallel(),  # noqa: B008 -- frozen
) -> nn.Module:
    """This rank's share of the model on its device, with its weights. Raises as `load_weights`."""
    model = build_outline(hf_config, cls, tp, dtype, device)
    # As `to_empty` does, whose `empty_like` imports sympy: 2 s in every process that makes an engine.
    model._apply(lambda param: torch.empty(param.shape, dtype=param.dtype, device=device))
    if config.load_format == "dummy":
        fill_with_random_weights(model, seed=tp.rank)
    elif config.load_format == "sharded_state":
        load_shard(model, tp.rank, path)
    else:
        load_weights(model, path)
    lay_out_weights(model)
    return model.eval()


def build_outline(
    hf_config: Any,
    cls: type,
    tp: TensorParallel = TensorParallel(),  # noqa: B008 -- frozen
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> nn.Module:
    """A rank's model without memory: names, shapes, dtypes and weight formats. `device` is where it is to run.

    Raises ValueError if it cannot be cut so.
    """
    with torch.device("meta"):
        model = cls(hf_config, tp).to(dtype)
        for module in model.modules():
            if isinstance(module, RMSNorm) and module.one_plus:
                module.weight = nn.Parameter(module.weight.float(), requires_grad=False)
        for layer in _formatted(model):
            if device == "cpu":
                layer.use_packed_format(dtype)
    return model


def lay_out_weights(model: nn.Module) -> None:
    """Turn loaded weights into the form that each layer's product reads."""
    for layer in _formatted(model):
        layer.format.lay_out(layer)


def drop_weights(model: nn.Module) -> None:
    """Leave the model without memory, and its parameters as before loading."""
    for layer in _formatted(model):
        layer.format.drop(layer)
    model.to_empty(device="meta")


def _formatted(model: nn.Module) -> Iterator[Any]:
    """The layers that have a weight format: `Linear` and what has its methods."""
    return (module for module in model.modules() if hasattr(module, "format"))


def tensor_places(model: nn.Module) -> dict[str, Place]:
    """The checkpoint's tensor names, and where each belongs in a model whose weights are not laid out yet.

    A module whose parameters the checkpoint splits up or names in another way has `checkpoint_names`: name within the
    module -> (parameter, shard).
    """
    places: dict[str, Place] = {}

    def join(*parts: str) -> str:
        names = ".".join(filter(None, parts)).split(".")
        return ".".join(model.renamed.get(name, name) for name in names)

    for module_name, module in model.named_modules():
        for name, (leaf, shard) in getattr(module, "checkpoint_names", {}).items():
            places[join(module_name, name)] = (module_name, leaf, shard)
    for name, _ in model.named_parameters():
        module_name, _, leaf = name.rpartition(".")
        if hasattr(model.get_submodule(module_name), "checkpoint_names"):
            continue
        prefix, _, module_leaf = module_name.rpartition(".")
        for source, shard in model.packed_modules.get(module_leaf, [(module_leaf, None)]):
            places[join(prefix, source, leaf)] = (module_name, leaf, shard)
    return places


def tensor_dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    """The dtype in which the model keeps each of the checkpoint's tensors."""
    places = tensor_places(model)
    return {name: model.get_parameter(f"{module}.{leaf}").dtype for name, (module, leaf, _) in places.items()}


def list_names(names: Collection[str]) -> str:
    """The first five names, and how many more there are."""
    shown = ", ".join(sorted(names)[:5])
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown


def _fill(
    model: nn.Module, places: dict[str, Place], tensors: NamedTensors, loaded: set[str], source: str = ""
) -> None:
    """Copy each tensor to its place in `model`, and add its name to `loaded`."""
    for name, tensor in tensors:
        if name in loaded:
            raise ValueError(f"tensor {name!r} is there twice{source}")
        if name not in places:
            if _is_redundant(name, model):
                continue
            raise ValueError(f"tensor {name!r}{source} is not a part of {type(model).__name__}")
        module_name, leaf, shard = places[name]
        owner = model.get_submodule(module_name)
        if hasattr(owner, "format") and leaf != "bias":  # no format lays out a bias
            owner.format.undo_layout(owner)
        param = getattr(owner, leaf)
        allowed = DTYPES if param.dtype in DTYPES else (param.dtype,)  # numbers, or a format's codes
        if tensor.dtype not in allowed:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
            raise ValueError(f"tensor {name!r}{source} is {tensor.dtype}: weights must be {names}")
        try:
            with torch.inference_mode():  # here and not around the loop, for `tensors` may be the caller's generator
                owner.load_shard(param, tensor, shard)
        except ValueError as error:
            raise ValueError(f"tensor {name!r}{source}: {error}") from error
        loaded.add(name)


def _pairs(named_tensors: NamedTensors) -> NamedTensors:
    """Yields `named_tensors`. Raises TypeError at an entry that is not a name and a tensor."""
    if not isinstance(named_tensors, Iterable):
        raise TypeError(f"named_tensors={named_tensors!r:.80} must be pairs of a name and a tensor")
    for pair in named_tensors:
        match pair:
            case (str(), torch.Tensor()):
                yield pair
            case _:
                raise TypeError(f"named_tensors has {pair!r:.80}: it must have pairs of a name and a tensor")


def _is_redundant(name: str, model: nn.Module) -> bool:
    """Whether the model computes this tensor itself, or has it under another name."""
    return name.endswith("rotary_emb.inv_freq") or (model.lm_head.is_tied and name == HEAD)
