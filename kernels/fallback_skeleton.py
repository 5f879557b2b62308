"""A model of transformers, taken apart at its decoder layers.

The model is built on the meta device, without a byte of weights, from classes inside the installed transformers, never
from code that comes with a checkpoint. It is then run as transformers runs it, but each layer's `forward` goes through
a `Flow`, which decides what enters the layer and where the pass ends. So whatever a model does around its layers
(rotations, masks, learned positions, scales, the order of arguments) stays its own business, and a span of blocks is:
enter at one layer with hidden states from outside, leave after another.

How layers return their results and which shape their keys and values have is found out by a pass over the meta model.
Models whose layers do not keep keys and values, one layer one pair, are refused here.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Final

import torch
from huggingface_hub.errors import StrictDataclassError

from ..protocol.errors import ConfigError, UnsupportedModel

INSTALL: Final = "pip install 'swarmnode-p2p[hf]'"
FAULTS: Final = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError),
    *(NotImplementedError, OSError, RuntimeError, StrictDataclassError, TypeError, ValueError),
)
"""What a model that is not made the usual way may raise when it is built or run the usual way."""
ATTENTION: Final = frozenset(("attention", "chunked_attention", "full_attention", "sliding_attention"))
"""Kinds of layers, where a config lists them, that cache keys and values and nothing else."""
_PROBE_ROWS: Final = 2
_LONGEST_CAUSE: Final = 200


class Arrived(Exception):
    """Ends a pass after the last layer that was asked for."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class WrongForm(Exception):
    """A layer was given something else than hidden states: the one before it returned them in the wrong form."""


class Flow:
    """What happens at each layer in the pass under way. This one lets no layer run."""

    tuples = False
    """Whether layers return (hidden, ...) instead of hidden."""

    def pack(self, hidden: torch.Tensor) -> Any:
        """Hidden states in the form in which the model's loop takes them from a layer."""
        return (hidden, None) if self.tuples else hidden

    def at(self, index: int, layer: Callable[[torch.Tensor], Any], hidden: torch.Tensor) -> Any:
        """What layer `index` is to return for `hidden`; `layer` runs it."""
        return self.pack(hidden)


class Skeleton:
    """See the module. Raises ConfigError where transformers is not installed, UnsupportedModel."""

    def __init__(self, settings: str, device: torch.device | None = None) -> None:
        transformers = load_transformers()
        self.device = device or torch.device("cpu")
        values = json.loads(settings)
        self.name = str(values.get("model_type"))
        if self.name not in transformers.CONFIG_MAPPING:
            raise UnsupportedModel(f"transformers {transformers.__version__} does not know {self.name!r} either")
        with self.guarded("cannot be built"):
            self.config = transformers.CONFIG_MAPPING[self.name].from_dict(values)
            _check_config(self.name, self.config)
            self.model = _model(transformers, self.config)
        self.base: Any = getattr(self.model, self.model.base_model_prefix, self.model)
        self.path, self.layers = self._find_layers()
        self._check_layers()
        self.hidden_size = int(self.config.hidden_size)
        self._arguments = set(inspect.signature(self.base.forward).parameters)
        self._flow = Flow()
        self._running = threading.Lock()
        for index, layer in enumerate(self.layers):
            layer.forward = partial(self._step, index, layer.forward)
        self.tuples, self.cached = self._probe()

    @contextmanager
    def guarded(self, what: str) -> Iterator[None]:
        """Turn what an unusual model raises into UnsupportedModel."""
        try:
            yield
        except FAULTS as exc:
            cause = " ".join(f"{type(exc).__name__}: {exc}".split())[:_LONGEST_CAUSE]
            raise UnsupportedModel(
                f"model family {self.name!r} {what} by transformers' own decoder layers ({cause})"
            ) from exc

    def _find_layers(self) -> tuple[str, Any]:
        """The decoder's list of layers: of the lists of that length, the outermost."""
        count = getattr(self.config, "num_hidden_layers", None)
        found = [
            (name, module)
            for name, module in self.model.named_modules()
            if isinstance(module, torch.nn.ModuleList) and len(module) == count
        ]
        if not found:
            raise UnsupportedModel(f"model family {self.name!r} has no list of {count} decoder layers: not supported")
        return min(found, key=lambda item: item[0].count("."))

    def _check_layers(self) -> None:
        for module in self.layers.modules():
            if getattr(module, "is_causal", True) is False or getattr(module, "is_decoder", True) is False:
                raise UnsupportedModel(f"model family {self.name!r} attends in both directions: it generates no text")

    def _step(self, index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        named = not args
        hidden = kwargs.pop("hidden_states", None) if named else args[0]
        if not isinstance(hidden, torch.Tensor) or hidden.dim() != 3:
            raise WrongForm

        def layer(rows: torch.Tensor) -> Any:
            return forward(hidden_states=rows, **kwargs) if named else forward(rows, *args[1:], **kwargs)

        return self._flow.at(index, layer, hidden)

    @property
    def embedding_path(self) -> str:
        """Where the table of token embeddings is in the model."""
        return self._path_of(self.model.get_input_embeddings())

    @property
    def head_path(self) -> str:
        """Where the LM head is."""
        return self._path_of(self.model.get_output_embeddings())

    def _path_of(self, module: Any) -> str:
        found = next((name for name, each in self.model.named_modules() if each is module), "")
        if not found:
            raise UnsupportedModel(f"model family {self.name!r} has no table of embeddings or no LM head")
        return found

    def run(self, rows: torch.Tensor, position: int, cache: Any, flow: Flow) -> Any:
        """Run the model between its embedding and its head over rows [count, hidden], under `flow`."""
        # a copy: some models scale it in place
        return self._call(self.base, {"inputs_embeds": rows.unsqueeze(0).clone()}, rows, position, cache, flow)

    def run_ids(self, ids: torch.Tensor, flow: Flow) -> Any:
        """The same from token ids [count]."""
        return self._call(self.base, {"input_ids": ids.unsqueeze(0)}, ids, 0, None, flow)

    def run_head(self, rows: torch.Tensor, flow: Flow) -> torch.Tensor:
        """The whole model; logits [count, vocab]."""
        found = self._call(self.model, {"inputs_embeds": rows.unsqueeze(0).clone()}, rows, 0, None, flow)
        logits: torch.Tensor = found.logits
        return logits[0]

    def _call(
        self, model: Any, given: dict[str, Any], rows: torch.Tensor, position: int, cache: Any, flow: Flow
    ) -> Any:
        given["use_cache"] = cache is not None
        if cache is not None:
            given["past_key_values"] = cache
        if "position_ids" in self._arguments:
            end = position + rows.shape[0]
            given["position_ids"] = torch.arange(position, end, device=rows.device).unsqueeze(0)
        with self._running:  # a client's generations share one head
            self._flow = flow
            return model(**given)

    def _probe(self) -> tuple[bool, tuple[int, int]]:
        """The form of layers' results, and the most heads and the widest head that any layer caches."""
        from .fallback_cache import Measuring, measuring_cache

        rows = torch.zeros(_PROBE_ROWS, self.hidden_size, device="meta")
        for tuples in (False, True):
            flow = Measuring(tuples)
            try:
                with self.guarded("cannot be run"), torch.device("meta"), torch.inference_mode():
                    out = self.run(rows, 0, measuring_cache(len(self.layers)), flow)[0]
                if out.shape != (1, *rows.shape):
                    raise WrongForm
                return tuples, flow.largest(self.name, len(self.layers))
            except WrongForm:
                continue
        raise UnsupportedModel(f"model family {self.name!r} hands more than hidden states from layer to layer")


def load_transformers() -> Any:
    """Import transformers without letting it reach for anything outside. Raises ConfigError when it is not there.

    Where Hugging Face's package `kernels` is installed it would download compute kernels; in a checkout of ours that
    name is this very package. So the name is blocked until transformers has looked for it, which it does once.
    """
    try:
        with _no_kernels_package():
            import transformers
            import transformers.core_model_loading
            from transformers.utils.import_utils import is_kernels_available

            is_kernels_available()
    except ImportError as exc:
        raise ConfigError(f"this family of models is run by transformers 5.23 or later: {INSTALL} ({exc})") from exc
    if not hasattr(transformers.core_model_loading, "convert_and_load_state_dict_in_model"):
        raise ConfigError(f"transformers {transformers.__version__} is too old, 5.23 is not: {INSTALL}")
    return transformers


@contextmanager
def _no_kernels_package() -> Iterator[None]:
    if "transformers" in sys.modules:
        yield
        return
    modules: dict[str, Any] = sys.modules
    absent = object()
    before = modules.get("kernels", absent)
    modules["kernels"] = None
    try:
        yield
    finally:
        if before is absent:
            del modules["kernels"]
        else:
            modules["kernels"] = before


def _check_config(name: str, config: Any) -> None:
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModel(f"model family {name!r} has an encoder and a decoder: decoder-only models are supported")
    kinds = {*(getattr(config, "layer_types", None) or ()), *(getattr(config, "layers_block_type", None) or ())}
    if other := sorted(kinds - ATTENTION):
        raise UnsupportedModel(
            f"model family {name!r} has layers of kind {other[0]}, which keep no keys and values: models of attention "
            f"alone are supported"
        )
    if getattr(config, "use_bidirectional_attention", False) in (True, "all"):
        raise UnsupportedModel(f"model family {name!r} attends in both directions: it generates no text")
    if parts := [key for key in config.sub_configs if re.search("audio|encoder|text|vision", key)]:
        raise UnsupportedModel(f"model family {name!r} is more than a language model: it has a {parts[0]}")


def _model(transformers: Any, config: Any) -> Any:
    """Of one of transformers' own classes, the mapping has no others. fp32 leaves torch's default dtype alone."""
    kinds: Mapping[Any, Any] = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    if type(config) not in kinds:
        raise UnsupportedModel(f"model family {config.model_type!r} is known to transformers, but generates no text")
    # fused attention knows no soft cap on scores
    capped = any("softcap" in key and value for key, value in config.to_dict().items())
    fused = getattr(kinds[type(config)], "_supports_sdpa", False) and not capped
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation="sdpa" if fused else "eager"
        ).eval()
