"""specfast.mlx.compare: what a precision changes against mlx-lm's layers, measured."""

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
mlx_lm = pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")

from mlx_hosts import host_model  # noqa: E402
from mlx_models import PATH, logits_of, random_model  # noqa: E402
from specfast import ConfigurationError, UnsupportedModelError, embedded  # noqa: E402
from specfast.mlx import accelerate, compare, report  # noqa: E402

TEXT = np.random.default_rng(0).integers(0, 96, 100).tolist()


@pytest.fixture(autouse=True)
def _cpu():
    mx.set_default_device(mx.cpu)


def test_precisions_in_order():
    """f32 is the reference up to rounding, and fewer bits are further away."""
    model = random_model("llama", "q8g32")
    before = logits_of(model, TEXT)
    found = {one.precision: one for one in compare(model, TEXT, dtype=mx.float32)}
    assert list(found) == ["int8", "bf16", "f32"]
    assert found["f32"].kl < 1e-6
    assert found["f32"].max_error < 1e-3
    assert found["f32"].greedy_agreement == 1
    for precision in ("int8", "bf16"):
        assert found["f32"].kl < found[precision].kl < 0.01
        assert 0.9 < found[precision].greedy_agreement <= 1
    assert {one.rows for one in found.values()} == {100}
    np.testing.assert_array_equal(logits_of(model, TEXT), before)
    assert report(model).path == "stock"


def test_the_definition():
    model = random_model("llama", "q4g64")
    (found,) = compare(model, TEXT, ["int8"])
    p = logits_of(model, TEXT).astype(np.float64)
    q = logits_of(accelerate(model, "int8"), TEXT).astype(np.float64)
    logp, logq = (x - np.log(np.exp(x).sum(1, keepdims=True)) for x in (p, q))
    assert found.kl == pytest.approx((np.exp(logp) * (logp - logq)).sum(1).mean(), rel=1e-6)
    assert found.greedy_agreement == (p.argmax(1) == q.argmax(1)).mean()
    compare(model, TEXT, ["bf16"])
    assert report(model).precision == "int8"  # as it was
    for path in ["native", PATH]:
        compare(accelerate(model, "int8", path), TEXT, ["bf16"])
        assert (report(model).precision, report(model).path) == ("int8", path)


def test_the_embedded_pair():
    model, tokenizer = mlx_lm.load(str(embedded.path("target")))
    text = tokenizer.encode(
        "import os\n\n\ndef count_lines(path):\n    with open(path) as file:\n        return len(file.readlines())\n"
    )
    for one in compare(model, text, dtype=mx.float32):
        assert one.kl < 0.01
        assert one.greedy_agreement > 0.9


def test_refusals():
    with pytest.raises(UnsupportedModelError, match=r"nothing to compare.*gemma2"):
        compare(host_model("gemma2"), TEXT[:8])
    with pytest.raises(ConfigurationError, match="1 tokens"):
        compare(random_model(), [1])
    with pytest.raises(ConfigurationError, match="fp8"):
        compare(random_model(), TEXT, ["fp8"])
