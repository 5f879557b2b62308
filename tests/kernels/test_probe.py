"""The probe covers what a model is made of, is the same every time, and notices rows that are not exact."""

from dataclasses import replace

import pytest
import torch
from helpers.tiny_models import make_config
from swarmnode.kernels import measure, norms, probe, scores
from swarmnode.kernels.models.config import ExpertsConfig, RopeConfig
from swarmnode.kernels.probe import PLAIN, ProbeWeights, probe_configs, probe_digest

LAYER = {"norm": "layer", "gated": False, "qkv_bias": True, "output_bias": True, "mlp_bias": True}
EXPERTS = ExpertsConfig(count=8, active=2, intermediate_size=64)
FORMS = {
    "llama": {},
    "bloom": {**LAYER, "alibi": "bloom", "rotary_dim": 0, "num_kv_heads": 4},
    "falcon": {**LAYER, "alibi": "falcon", "rotary_dim": 0, "num_kv_heads": 1, "residual": "shared"},
    "neox": {**LAYER, "rotary_dim": 8, "num_kv_heads": 4, "residual": "parallel"},
    "experts": {"experts": EXPERTS},
    "shared expert": {"experts": replace(EXPERTS, shared_size=64)},
    "oss": {
        "sinks": True,
        "swiglu_limit": 1.5,
        "experts": replace(EXPERTS, router="chosen", bias=True),
        "sliding_window": 16,
        "sliding_blocks": (True, False),
    },
    "gemma2": {"score_softcap": 5.0, "post_norms": True, "norm_offset": 1.0, "activation": "gelu_tanh"},
    "gemma3": {"qk_norm": True, "post_norms": True, "local_rope": RopeConfig(theta=500.0), "sliding_window": 16}
    | {"sliding_blocks": (True, False), "activation": "gelu_tanh"},
    "gelu": {"activation": "gelu", "final_softcap": 5.0},
}
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    probe_digest.cache_clear()
    yield
    torch.set_num_threads(1)
    probe_digest.cache_clear()


def test_every_form_has_a_digest_of_its_own_and_exact_rows(caplog):
    found = {probe_digest("none", BF16, config=make_config(**changes)) for changes in FORMS.values()}
    assert len(found) == len(FORMS)
    assert not caplog.records  # it warns where rows are not exact


@pytest.mark.slow
@pytest.mark.parametrize("quant", ["none", "int8", "nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_every_form_is_exact_however_it_is_held(caplog, quant, dtype):
    for changes in FORMS.values():
        probe_digest(quant, dtype, config=make_config(**changes))
    assert not caplog.records


def test_sizes_and_counts_do_not_matter_only_forms():
    small = make_config(num_blocks=2)
    large = make_config(num_blocks=7, hidden_size=512, intermediate_size=2048, vocab_size=999)
    assert probe_configs(small) == probe_configs(large)
    assert probe_digest("none", BF16, config=small) != probe_digest("none", BF16, config=PLAIN)  # other head size


def test_one_block_of_every_kind():
    mixed = make_config(
        num_blocks=4,
        experts=replace(EXPERTS, dense_blocks=(1, 3)),
        sliding_window=16,
        sliding_blocks=(True, True, False, False),
    )
    kinds = [(each.sliding_window is not None, each.experts is not None) for each in probe_configs(mixed)]
    assert kinds == [(False, False), (False, True), (True, False), (True, True)]
    assert [each.num_blocks for each in probe_configs(make_config())] == [1]


# One operation of each form, made to round as another processor's would, and which forms must notice.
def _shift(monkeypatch, owner, name):
    real = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: real(*args, **kwargs) * (1 + 2**-9))


OTHERS = {
    "layer norm": (norms.LayerNorm, "__call__", {"bloom", "falcon", "neox"}),
    "ALiBi": (scores.ScoreForm, "_tilt", {"bloom", "falcon"}),
    "sinks": (scores.ScoreForm, "sinks", {"oss"}),
}


@pytest.mark.parametrize("what", list(OTHERS))
def test_another_rounding_of_a_part_shows_in_the_models_that_have_it(monkeypatch, what):
    owner, name, forms = OTHERS[what]
    configs = {form: make_config(**FORMS[form]) for form in ("llama", "bloom", "falcon", "oss", "neox")}
    before = {form: probe_digest("none", torch.float32, config=config) for form, config in configs.items()}
    probe_digest.cache_clear()
    _shift(monkeypatch, owner, name)
    after = {form: probe_digest("none", torch.float32, config=config) for form, config in configs.items()}
    assert {form for form in configs if before[form] != after[form]} == forms


def test_the_digest_does_not_depend_on_threads():
    first = probe_digest("none", BF16)
    probe_digest.cache_clear()
    torch.set_num_threads(2)
    assert probe_digest("none", BF16) == first


def test_llm_int8_is_known_not_to_be_exact(caplog):
    probe_digest("llm-int8", BF16)
    assert "not row-exact for llm-int8" in caplog.text


def test_rows_that_depend_on_a_neighbour_are_noticed(monkeypatch, caplog):
    real = probe._together
    monkeypatch.setattr(probe, "_together", lambda span, rows: real(span, rows) * 1.01)
    probe_digest("none", BF16)
    assert "not row-exact" in caplog.text


def test_the_class_names_the_form():
    plain = measure.compute_class("none", BF16)
    assert measure.compute_class("none", BF16, config=PLAIN) == plain
    assert measure.compute_class("none", BF16, config=make_config(**FORMS["bloom"])) != plain


def test_fixed_values_are_fixed():
    values = probe.fixed_values((2, 3), 1)
    assert values.flatten().tolist() == pytest.approx(
        [0.166748, -0.107117, 0.808472, 0.10733, 0.886414, -0.806366], abs=1e-5
    )
    assert probe.fixed_values((100, 100), 5).mean().abs() < 0.02


def test_the_probe_has_no_8_bit_head():
    with pytest.raises(measure.ConfigError, match="not stored in 8 bits"):
        ProbeWeights(PLAIN).head_q8()
