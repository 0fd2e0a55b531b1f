import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from jobs import tiny_config
from meshformer.config.errors import ConfigError
from meshformer.job.build import build_task
from meshformer.optim import MuonAdamW, linear, muon, orthogonalise
from meshformer.optim.muon import COEFFICIENTS, SAFETY, multiplies_bfloat16, orthogonalisation_dtype

torch.set_num_threads(1)
# Square, wide and tall, on both sides of the ratio from which the Gram matrix is used.
SHAPES = [(24, 24), (24, 30), (30, 24), (16, 64), (64, 16)]


def draw(shape, seed=0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def written_out(matrix: Tensor, coefficients: str, iterations: int) -> Tensor:
    """The definition, by singular values in float64: U p(p(…p(S))) Vᵀ."""
    u, s, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / (s.square().sum().sqrt() * SAFETY[coefficients])
    table = COEFFICIENTS[coefficients]
    for k in range(iterations):
        a, b, c = table[min(k, len(table) - 1)]
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag(s) @ vt


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("coefficients", ["jordan", "polar_express"])
@pytest.mark.parametrize("iterations", [1, 3, 5, 7])
def test_orthogonalisation_equals_its_definition_on_singular_values(shape, coefficients, iterations):
    matrices = torch.stack([draw(shape, seed) for seed in range(3)])
    found = orthogonalise(matrices, coefficients, iterations)
    expected = torch.stack([written_out(m, coefficients, iterations) for m in matrices])
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_nearly_singular_and_zero_matrices_stay_finite(shape):
    rank_one = torch.outer(draw(shape[:1]), draw(shape[1:]))
    found = orthogonalise(torch.stack([rank_one, torch.zeros(shape), rank_one * 1e-20]))
    assert torch.isfinite(found).all()
    assert torch.linalg.matrix_norm(found[0], 2) < 1.3 and found[1].abs().max() == 0


def test_five_iterations_bring_singular_values_near_one():
    for coefficients, low, high in (("jordan", 0.6, 1.25), ("polar_express", 0.85, 1.15)):
        s = torch.linalg.svdvals(orthogonalise(draw((1, 64, 64)), coefficients, 5))
        assert s.max() < high and (s > low).float().mean() > 0.9, (coefficients, s.min(), s.max())


class Blocks(nn.Module):
    """Parameters with the names that decide: matrices below `blocks`, the rest outside."""

    def __init__(self, shapes, seed=0):
        super().__init__()
        self.blocks = nn.ModuleList()
        for index, shape in enumerate(shapes):
            layer = nn.Linear(shape[1], shape[0], bias=False)
            layer.weight.data = draw(shape, seed + index)
            self.blocks.append(layer)
        self.embedding = nn.Embedding(5, 8)
        self.embedding.weight.data = draw((5, 8), 99)
        self.norm = nn.LayerNorm(8)

    def grow_gradients(self, step):
        for index, p in enumerate(self.parameters()):
            p.grad = draw(tuple(p.shape), 1000 * step + index) * (0.1 + step)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_a_matrix_follows_torch_optim_muon_step_for_step(shape, scale, nesterov):
    """In bfloat16, as torch's class computes, so that the same numbers must come out and not only similar ones."""
    ours, theirs = Blocks([shape]), Blocks([shape])
    settings = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.3, "nesterov": nesterov}
    mine = muon(ours.named_parameters(), scale=scale, dtype="bfloat16", **settings)
    reference = torch.optim.Muon([theirs.blocks[0].weight], adjust_lr_fn=scale, **settings)
    for step in range(6):
        ours.grow_gradients(step)
        theirs.grow_gradients(step)
        mine.step()
        reference.step()
        # Batched and single bfloat16 products may round differently by one unit in the last place of a direction of size ≤ 1.
        difference = (ours.blocks[0].weight - theirs.blocks[0].weight).abs().max()
        assert difference <= (step + 1) * 0.02 * 0.02 * max(1.0, 0.2 * math.sqrt(max(shape))), (step, difference)
    torch.testing.assert_close(
        mine.state[ours.blocks[0].weight]["momentum_buffer"], reference.state[theirs.blocks[0].weight]["momentum_buffer"], rtol=0, atol=0
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_float32_follows_torch_optim_muon_with_its_rounding_taken_out(shape, monkeypatch):
    ours, theirs = Blocks([shape]), Blocks([shape])
    mine = muon(ours.named_parameters(), lr=0.02, weight_decay=0.1, dtype="float32")
    reference = torch.optim.Muon([theirs.blocks[0].weight], lr=0.02, weight_decay=0.1)
    monkeypatch.setattr(Tensor, "bfloat16", lambda self: self.clone())  # the one place where torch's class rounds
    for step in range(6):
        ours.grow_gradients(step)
        theirs.grow_gradients(step)
        mine.step()
        reference.step()
    torch.testing.assert_close(ours.blocks[0].weight, theirs.blocks[0].weight, rtol=0, atol=2e-5)


def test_batched_matrices_move_as_they_would_alone():
    shapes = [*SHAPES, *SHAPES[::-1]]
    together = Blocks(shapes)
    optimizer = muon(together.named_parameters(), lr=0.02, dtype="float32")
    alone = [copy.deepcopy(layer.weight) for layer in together.blocks]
    single = [MuonAdamW([{"params": [p], "method": "muon"}], lr=0.02, dtype="float32") for p in alone]
    for step in range(3):
        together.grow_gradients(step)
        for layer, p, one in zip(together.blocks, alone, single, strict=True):
            p.grad = layer.weight.grad.clone()
            one.step()
        optimizer.step()
    for layer, p in zip(together.blocks, alone, strict=True):
        torch.testing.assert_close(layer.weight, p, rtol=0, atol=1e-6)


@pytest.mark.parametrize("fused", [True, False])
def test_the_rest_follows_torch_optim_adamw(fused):
    ours, theirs = Blocks([(8, 8)]), Blocks([(8, 8)])
    mine = muon(ours.named_parameters(), lr=0.02, adamw_lr=3e-3, adamw_weight_decay=0.2, adamw_betas=(0.8, 0.9), fused=fused)
    reference = torch.optim.AdamW(
        [
            {"params": [theirs.embedding.weight], "weight_decay": 0.2},
            {"params": list(theirs.norm.parameters()), "weight_decay": 0.0},
        ],
        lr=3e-3,
        betas=(0.8, 0.9),
        foreach=False,
    )
    for step in range(6):
        ours.grow_gradients(step)
        theirs.grow_gradients(step)
        mine.step()
        reference.step()
    for name in ("embedding.weight", "norm.weight", "norm.bias"):
        torch.testing.assert_close(ours.get_parameter(name), theirs.get_parameter(name), rtol=0, atol=1e-6)
    assert {g["method"]: g["lr"] for g in mine.param_groups} == {"muon": 0.02, "adamw": 3e-3}
    assert [g["weight_decay"] for g in mine.param_groups] == [0.0, 0.2, 0.0]


def test_state_dict_round_trip_continues_bit_for_bit(tmp_path):
    whole = Blocks(SHAPES)
    optimizer = muon(whole.named_parameters(), lr=0.02, weight_decay=0.1)
    for step in range(3):
        whole.grow_gradients(step)
        optimizer.step()
    torch.save({"model": whole.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "saved.pt")
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    resumed = Blocks(SHAPES, seed=50)
    resumed.load_state_dict(saved["model"])
    again = muon(resumed.named_parameters(), lr=0.5, weight_decay=0.7)
    again.load_state_dict(saved["optimizer"])
    assert again.param_groups[0]["lr"] == 0.02 and again.param_groups[0]["param_names"][0] == "blocks.0.weight"
    for step in range(3, 6):
        for model, one in ((whole, optimizer), (resumed, again)):
            model.grow_gradients(step)
            one.step()
    for name, p in whole.named_parameters():
        assert torch.equal(p, resumed.get_parameter(name)), name


def test_a_schedule_moves_both_rates():
    model = Blocks([(8, 8)])
    optimizer = muon(model.named_parameters(), lr=0.02, adamw_lr=0.004)
    scheduler = LambdaLR(optimizer, linear(10))
    for step in range(5):
        model.grow_gradients(step)
        optimizer.step()
        scheduler.step()
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.01, 0.002, 0.002])


def test_step_runs_the_closure_with_gradients_on_and_skips_parameters_without_one():
    model = Blocks([(8, 8), (8, 8)])
    before = model.blocks[1].weight.clone()

    def closure():
        loss = model.blocks[0](torch.ones(2, 8)).square().sum()
        loss.backward()
        return loss

    optimizer = muon(model.named_parameters(), lr=0.02, weight_decay=0.5)
    assert optimizer.step(closure).item() > 0
    assert torch.equal(model.blocks[1].weight, before) and model.blocks[1].weight not in optimizer.state


def test_muon_learns_a_rotation():
    torch.manual_seed(0)
    target = torch.linalg.qr(torch.randn(8, 8))[0]
    model = Blocks([(8, 8)])
    optimizer = muon(model.named_parameters(), lr=0.2)
    scheduler = LambdaLR(optimizer, linear(120))
    x = torch.randn(64, 8)
    for _ in range(120):
        optimizer.zero_grad()
        loss = (model.blocks[0](x) - x @ target).square().mean()
        loss.backward()
        optimizer.step()
        scheduler.step()
    # From about 20; what is left is the length of the last updates, and plain SGD at this rate diverges.
    assert loss.item() < 0.02


def test_the_type_follows_the_device():
    cpu = torch.device("cpu")
    known = torch.cpu.get_capabilities()
    native = bool(known.get("avx512_bf16") or known.get("amx_bf16"))
    assert multiplies_bfloat16("cpu") is native
    assert orthogonalisation_dtype("auto", cpu, torch.float32) is (torch.bfloat16 if native else torch.float32)
    assert orthogonalisation_dtype("auto", cpu, torch.float64) is torch.float64
    assert orthogonalisation_dtype("bfloat16", cpu, torch.float32) is torch.bfloat16


def test_emulated_bfloat16_is_not_chosen(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    assert orthogonalisation_dtype("auto", torch.device("cpu"), torch.bfloat16) is torch.float32
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "amx_bf16": True})
    assert orthogonalisation_dtype("auto", torch.device("cpu"), torch.float32) is torch.bfloat16


@pytest.mark.parametrize(("precision", "dtype"), [("32-true", "float32"), ("bf16-mixed", "auto")])
def test_full_precision_is_full_in_the_orthogonalisation_too(tmp_path, precision, dtype):
    for given, expected in [([], dtype), (["optimizer.dtype=bfloat16"], "bfloat16")]:
        config = tiny_config(tmp_path, f"trainer.precision={precision}", *given)
        config["model"]["vocab_size"] = 8
        task = build_task(config, 10)
        task.configure_model()
        optimizer = task.make_optimizer(task.model.named_parameters())
        assert [g["dtype"] for g in optimizer.param_groups if g["method"] == "muon"] == [expected]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale": "big"}, "optimizer.scale=big"),
        ({"coefficients": "kepler"}, "optimizer.coefficients=kepler"),
        ({"dtype": "int8"}, "optimizer.dtype=int8"),
        ({"iterations": 0}, "optimizer.iterations=0"),
        ({"momentum": 1.0}, "optimizer.momentum=1.0"),
        ({"adamw_lr": -1.0}, "optimizer.adamw_lr=-1.0"),
    ],
)
def test_impossible_settings_name_key_and_value(settings, message):
    with pytest.raises(ConfigError, match=message):
        muon(Blocks([(8, 8)]).named_parameters(), **settings)


def test_a_model_without_hidden_matrices_is_refused():
    with pytest.raises(ConfigError, match="optimizer=adamw"):
        muon(nn.Linear(4, 4).named_parameters())
