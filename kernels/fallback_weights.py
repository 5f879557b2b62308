"""Stored tensors into the meta model of a skeleton: only those asked for, by transformers' own conversions.

transformers knows what checkpoints of all ages call their tensors and how it fuses them (experts for instance). It gets
them as views of the mapped files. Whatever is asked for must be there afterwards: transformers itself would fill gaps
with random numbers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final

import torch

from ..protocol.errors import CorruptCheckpoint, UnsupportedModel
from .fallback_skeleton import Skeleton, load_transformers
from .loading.shapes import IGNORED

_MOST_NAMED: Final = 4


class Loader:
    """Fills one skeleton. `where` is the checkpoint's folder, for messages."""

    def __init__(self, skeleton: Skeleton, where: str, dtype: torch.dtype, device: torch.device) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.modeling_utils import LoadStateDictConfig

        self._skeleton = skeleton
        self._model = skeleton.model
        self._where = where
        self._device = device
        plan = self._model._get_dtype_plan(dtype)  # what has to stay in fp32
        for name, parameter in self._model.named_parameters():
            wanted = next((kept for pattern, kept in plan.items() if pattern in name), dtype)
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(wanted)
        self._how = LoadStateDictConfig(
            dtype=dtype,
            dtype_plan=plan,
            device_map={"": device},
            weight_mapping=get_model_conversion_mapping(self._model),
        )

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put stored tensors where they belong. Raises CorruptCheckpoint, UnsupportedModel."""
        core = load_transformers().core_model_loading
        with self._skeleton.guarded("cannot be loaded"), _no_progress_bar(), torch.no_grad():
            info, _ = core.convert_and_load_state_dict_in_model(self._model, dict(tensors), self._how)
        if info.conversion_errors or info.error_msgs:
            raise UnsupportedModel(f"{self._where}: {_list([*map(str, info.conversion_errors), *info.error_msgs])}")
        if info.mismatched_keys:
            raise CorruptCheckpoint(
                f"{self._where}: {_list(map(str, info.mismatched_keys))} contradict its config.json"
            )
        ignored = self._model._keys_to_ignore_on_load_unexpected or ()
        unknown = [
            name
            for name in info.unexpected_keys
            if not name.endswith(IGNORED) and not any(re.search(pattern, name) for pattern in ignored)
        ]
        if unknown:
            raise UnsupportedModel(f"{self._where}: has {_list(unknown)}, which its model family does not know")

    def tie(self) -> None:
        """Let head and embedding be one matrix, whichever of them is stored."""
        first, second = self._model.get_input_embeddings(), self._model.get_output_embeddings()
        if second.weight.is_meta:
            second.weight = first.weight
        elif first.weight.is_meta:
            first.weight = second.weight

    def finish(self, wanted: Callable[[str], bool]) -> None:
        """Make what is not stored, and check that nothing is missing, in the modules whose paths are wanted."""
        missing = []
        for path, module in self._model.named_modules():
            if not wanted(path):
                continue
            self._make_buffers(module)
            kept = {**module._parameters, **module._buffers, **_loose(module)}
            missing += [f"{path}.{name}" for name, tensor in kept.items() if _is_meta(tensor)]
        if missing:
            raise CorruptCheckpoint(f"{self._where}: lacks {_list(missing)}: the download may be incomplete")

    def _make_buffers(self, module: torch.nn.Module) -> None:
        """Rotary frequencies and the like, which follow from the config: transformers' initialization makes them."""
        names = [name for name in module._non_persistent_buffers_set if _is_meta(module._buffers.get(name))]
        if not names:
            return
        for name in names:
            buffer = module._buffers[name]
            assert buffer is not None
            empty = torch.empty_like(buffer, device=self._device)
            module._buffers[name] = empty.fill_(torch.nan) if empty.is_floating_point() else empty
        with torch.no_grad():
            self._model._init_weights(module)
        for name in names:
            made = module._buffers[name]
            if made is not None and made.is_floating_point() and made.isnan().any():
                raise UnsupportedModel(f"{self._where}: transformers does not say what buffer {name!r} holds")


def _loose(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Tensors that a module keeps without saying so: nothing fills them."""
    return {name: value for name, value in vars(module).items() if isinstance(value, torch.Tensor)}


def _is_meta(tensor: torch.Tensor | None) -> bool:
    return tensor is not None and tensor.is_meta


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    logging = load_transformers().utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _list(names: Iterable[str]) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - _MOST_NAMED} more" if len(ordered) > _MOST_NAMED else ""
    return ", ".join(ordered[:_MOST_NAMED]) + more
