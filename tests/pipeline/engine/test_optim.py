"""LAMB against golden vectors and a plain transcription, AdamW against torch's, and the choice of backend."""

import itertools
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn import Parameter

from pipeline.config import OptimizerConfig
from pipeline.engine import optim
from pipeline.engine.backend import ApexLamb, apex_fused_lamb, of_config
from pipeline.engine.optim import AdamW, Lamb, decays, global_norm
from pipeline.engine.reduce import ALIGN, GradientBuffer
from pipeline.errors import CheckpointError, ConfigError, EnvironmentFault

GOLDEN = json.loads((Path(__file__).parent / "golden" / "lamb.json").read_text())
NAMES = ("dense.weight", "dense.bias", "zero.weight")


@pytest.fixture(params=[False, True], ids=["chunks", "flat"])
def placed(request):
    """Both code paths: what lets an optimizer take its own; that of a GPU also runs on CPU tensors."""
    return in_flat_buffers if request.param else lambda optimizer: optimizer


def in_flat_buffers(optimizer):
    """``optimizer`` with its weights, gradients and moments as a GPU keeps them."""
    parameters = list(optimizer.parameters.values())
    if parameters[0].dtype == torch.float32:
        gradients = GradientBuffer(parameters)
    else:  # GradientBuffer refuses other dtypes, which the optimizer does not mind
        spans, end = [], 0
        for p in parameters:
            spans.append((end, end + p.numel()))
            end += -(-p.numel() // ALIGN) * ALIGN
        gradients = SimpleNamespace(parameters=parameters, spans=spans, flat=torch.zeros(end, dtype=torch.float64))
        for p, (start, stop) in zip(parameters, spans, strict=True):
            p.grad = gradients.flat[start:stop].view_as(p)
    optimizer.use(gradients)
    return optimizer


def parameters(values, dtype=torch.float64):
    return {name: Parameter(torch.tensor(v, dtype=dtype)) for name, v in zip(NAMES, values, strict=True)}


def set_gradient(p, value):
    """In place where there is one, as a backward does."""
    if p.grad is None:
        p.grad = value
    else:
        p.grad.copy_(value)


def set_gradients(params, values):
    for p, v in zip(params.values(), values, strict=True):
        set_gradient(p, torch.tensor(v, dtype=p.dtype))


def model(seed=0, dtype=torch.float32):
    """A few tensors of which one spans several chunks and none is a multiple of the chunk."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a.weight": (700, 513), "a.bias": (513,), "LayerNorm.weight": (7,), "b.weight": (3, 5)}
    return {n: Parameter(torch.randn(s, generator=generator, dtype=dtype)) for n, s in shapes.items()}


def random_gradients(params, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    for p in params.values():
        set_gradient(p, scale * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype))


@pytest.mark.parametrize(("variant", "key"), [("apex", "steps_default"), ("nvlamb", "steps_use_nvlamb")])
def test_lamb_equals_the_golden_vectors(variant, key, placed):
    params = parameters(GOLDEN["params0"])
    lamb = placed(Lamb(params.items(), betas=tuple(GOLDEN["betas"]), eps=GOLDEN["eps"], variant=variant))
    for gradients, expected in zip(GOLDEN["grads"], GOLDEN[key], strict=True):
        set_gradients(params, gradients)
        norm = lamb.step(GOLDEN["lr"], max_grad_norm=GOLDEN["max_grad_norm"])
        assert norm == pytest.approx(expected["grad_norm"], rel=1e-12)
        for p, values, gradient in zip(params.values(), expected["params"], gradients, strict=True):
            assert p.tolist() == pytest.approx(values, rel=1e-12, abs=1e-15)
            assert p.grad.tolist() == gradient  # still usable after the step


class PlainLamb(torch.optim.Optimizer):
    """apex FusedLAMB's options and semantics, transcribed the plain way: an oracle, and apex's stand-in."""

    def __init__(self, params, betas=(0.9, 0.999), eps=1e-6, use_nvlamb=False):
        options = {"betas": betas, "eps": eps}
        super().__init__(params, options | {"lr": 0.0, "max_grad_norm": 1.0})
        self.use_nvlamb = use_nvlamb

    @torch.no_grad()
    def step(self):
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        norm = torch.stack([g.double().norm() for g in grads]).norm()
        divisor = max(1.0, float(norm) / self.defaults["max_grad_norm"])
        for group in self.param_groups:
            (b1, b2), wd = group["betas"], group["weight_decay"]
            group["step"] = group.get("step", 0) + 1
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                m, v, g = state["exp_avg"], state["exp_avg_sq"], p.grad / divisor
                m.copy_(b1 * m + (1 - b1) * g)
                v.copy_(b2 * v + (1 - b2) * g * g)
                correct = [1 - b ** group["step"] for b in (b1, b2)]
                u = (m / correct[0]) / ((v / correct[1]).sqrt() + group["eps"]) + wd * p
                p_norm, u_norm = p.double().norm(), u.double().norm()
                adapt = (wd != 0 or self.use_nvlamb) and p_norm > 0 and u_norm > 0
                p.sub_(group["lr"] * (float(p_norm / u_norm) if adapt else 1.0) * u)
                p.grad.copy_(u)  # as the kernel does


def plain(params, **options):
    groups = [{"params": [p], "weight_decay": 0.01 if decays(n) else 0.0} for n, p in params.items()]
    return PlainLamb(groups, **options)


@pytest.mark.parametrize("scale", [1e-4, 1.0])
def test_lamb_equals_a_plain_loop_in_fp32(placed, scale):
    ours, theirs = model(), model()
    lamb = placed(Lamb(ours.items()))
    oracle = plain(theirs)
    for step in range(5):
        random_gradients(ours, step, scale)
        random_gradients(theirs, step, scale)
        lamb.step(0.01, max_grad_norm=1.0)
        for group in oracle.param_groups:
            group["lr"] = 0.01
        oracle.step()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_adamw_equals_torch(placed, max_grad_norm):
    ours, theirs = model(), model()
    adamw = placed(AdamW(ours.items(), eps=1e-8, weight_decay=0.1))
    groups = [{"params": [p], "weight_decay": 0.1 if decays(n) else 0.0} for n, p in theirs.items()]
    oracle = torch.optim.AdamW(groups, lr=0.01, eps=1e-8)
    for step in range(5):
        random_gradients(ours, step)
        random_gradients(theirs, step)
        norm = adamw.step(0.01, max_grad_norm=max_grad_norm)
        assert norm == pytest.approx(
            float(torch.nn.utils.clip_grad_norm_(theirs.values(), max_grad_norm or math.inf)), rel=1e-4
        )
        oracle.step()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6)


def test_decay_spares_biases_and_layer_norms():
    assert decays("bert.embeddings.word_embeddings.weight")
    for name in ("x.dense.bias", "x.LayerNorm.weight", "x.gamma", "x.beta", "cls.predictions.bias"):
        assert not decays(name)


@pytest.mark.parametrize("kind", [Lamb, AdamW])
def test_a_state_carries_on_bitwise_and_a_step_repeats_bitwise(kind):
    straight, first, second = model(), model(), model()
    whole, part = kind(straight.items()), kind(first.items())
    for step in range(3):
        random_gradients(straight, step)
        random_gradients(first, step)
        whole.step(0.01, max_grad_norm=1.0)
        part.step(0.01, max_grad_norm=1.0)
    resumed = kind(second.items())
    resumed.load({key: tensor.clone() for key, tensor in part.state().items()})
    with torch.no_grad():
        for name, p in second.items():
            p.copy_(first[name])
    for params, optimizer in ((straight, whole), (second, resumed)):
        random_gradients(params, 9)
        optimizer.step(0.01, max_grad_norm=1.0)
    assert whole.state()["step"].item() == 4
    for key, tensor in whole.state().items():
        assert torch.equal(tensor, resumed.state()[key]), key
    for name in straight:
        assert torch.equal(straight[name], second[name])


def test_a_state_of_another_model_is_refused_and_nothing_changes():
    params = model()
    lamb = Lamb(params.items())
    state = lamb.state()
    short = {k: v for k, v in state.items() if k != "exp_avg.b.weight"}
    with pytest.raises(CheckpointError, match=r"missing exp_avg\.b\.weight$"):
        lamb.load(short)
    with pytest.raises(CheckpointError, match=r"unknown exp_avg\.c"):
        lamb.load(state | {"exp_avg.c": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"exp_avg\.b\.weight is \(3, 4\), not \(3, 5\)"):
        lamb.load({k: torch.ones_like(v) for k, v in state.items()} | {"exp_avg.b.weight": torch.zeros(3, 4)})
    with pytest.raises(CheckpointError, match="and 6 more"):
        lamb.load({})
    assert not any(tensor.any() for tensor in lamb.state().values())


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("kind", [Lamb, AdamW])
def test_a_gradient_that_is_not_finite_changes_nothing(kind, value):
    params, untouched = model(), model()
    optimizer = kind(params.items())
    random_gradients(params, 0)
    params["a.weight"].grad[600, 3] = value
    assert not math.isfinite(optimizer.step(0.1, max_grad_norm=1.0))
    assert optimizer.finished_steps == 0
    assert all(torch.equal(params[n], untouched[n]) for n in params)


def test_a_parameter_without_gradient_stays():
    params, twin = model(), model()
    optimizer, other = AdamW(params.items()), AdamW(twin.items())
    for p in (params, twin):
        random_gradients(p, 1)
        p["b.weight"].grad = None
    before = params["b.weight"].detach().clone()
    norm = optimizer.step(0.1, max_grad_norm=1.0)
    for p in twin.values():
        if p.grad is not None:
            p.grad /= norm
    other.step(0.1, max_grad_norm=0.0)
    assert torch.equal(params["b.weight"], before)
    assert all(torch.equal(params[n], twin[n]) for n in params)


def test_global_norm_is_good_where_a_single_pass_is_not():
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(3_000_000, generator=generator)
    exact = float(tensor.double().norm())
    assert global_norm([tensor, torch.zeros(3), tensor]) == pytest.approx(exact * math.sqrt(2), rel=2e-6)
    assert global_norm([]) == 0.0


@pytest.fixture
def decoy(tmp_path, monkeypatch):
    """A package named apex that must not be imported, on a machine that seems to have CUDA."""
    (tmp_path / "apex").mkdir()
    for file in ("__init__.py", "optimizers.py"):
        (tmp_path / "apex" / file).write_text("raise RuntimeError('the decoy was imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delitem(sys.modules, "apex", raising=False)
    return tmp_path


def test_the_unrelated_package_apex_is_never_imported(decoy):
    assert apex_fused_lamb() is None
    assert type(of_config(OptimizerConfig(backend="auto"), model().items())) is Lamb
    with pytest.raises(EnvironmentFault, match=r"^optimizer\.backend = apex needs CUDA and NVIDIA's apex .*$"):
        of_config(OptimizerConfig(backend="apex"), model().items())
    assert "apex" not in sys.modules


@pytest.mark.parametrize(
    "content", ["", "class FusedLAMB:\n    def __init__(self, *a, **k):\n        self.state = {}\n"]
)
def test_only_an_apex_with_extension_and_fused_lamb_is_taken(decoy, monkeypatch, content):
    (decoy / "amp_C.py").write_text("")
    (decoy / "apex" / "__init__.py").write_text("")
    (decoy / "apex" / "optimizers.py").write_text(content)
    for name in ("apex", "apex.optimizers", "amp_C"):
        monkeypatch.setitem(sys.modules, name, None)  # what is imported below goes away with the test
        del sys.modules[name]
    assert (apex_fused_lamb() is not None) == bool(content)
    assert type(of_config(OptimizerConfig(backend="auto"), model().items())) is (ApexLamb if content else Lamb)
    assert type(of_config(OptimizerConfig(backend="torch"), model().items())) is Lamb
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert apex_fused_lamb() is None


@pytest.mark.parametrize("variant", ["apex", "nvlamb"])
def test_apex_backend_is_wired_like_our_own(variant):
    ours, theirs = model(), model()
    lamb = Lamb(ours.items(), variant=variant)
    apex = ApexLamb(PlainLamb, theirs.items(), variant=variant)
    for step, limit in itertools.product(range(3), (1.0, 0.0)):
        random_gradients(ours, step)
        random_gradients(theirs, step)
        norms = lamb.step(0.01, max_grad_norm=limit), apex.step(0.01, max_grad_norm=limit)
        assert norms[0] == norms[1]
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6)
    for key, tensor in lamb.state().items():
        torch.testing.assert_close(apex.state()[key], tensor, rtol=1e-5, atol=1e-6)


def test_a_configuration_becomes_its_optimizer():
    assert type(of_config(OptimizerConfig(name="adamw"), model().items())) is AdamW
    lamb = of_config(OptimizerConfig(backend="torch", variant="nvlamb", eps=1e-5), model().items())
    assert isinstance(lamb, Lamb)
    assert (lamb.variant, lamb.eps) == ("nvlamb", 1e-5)
    with pytest.raises(ConfigError, match="take auto or torch with adamw"):
        of_config(OptimizerConfig(name="adamw", backend="apex"), model().items())


def test_chunk_is_larger_than_no_test_tensor():
    assert model()["a.weight"].numel() > 2 * optim.CHUNK  # else the tests above see one chunk only
