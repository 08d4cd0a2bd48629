"""AdamW against torch's; Muon over batches of matrices against torch's, one matrix at a time, and against float64."""

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gristmill.model import ModelConfig, Transformer, init_weights
from gristmill.train.config import OptimizerConfig
from gristmill.train.optim import OPTIMIZERS, muon
from gristmill.train.optim.parameters import hidden_matrices, split_matrices
from gristmill.train.optimizer import Optimizer

MODEL = ModelConfig(
    d_model=32, n_layers=2, n_heads=4, kv_n_heads=2, ffn_hidden_size=48, moe_num_experts=4, moe_top_k=2,
    vocab_size=128, max_seq_len=64,
)  # fmt: skip
CFG = OptimizerConfig(name="muon", lr=0.01, weight_decay=0.1, clip_norm=1e9)


def with_gradients(model: Transformer, seed: int, scale: float = 1.0) -> None:
    torch.manual_seed(seed)
    for param in model.parameters():
        param.grad = torch.randn_like(param) * scale


def two_models(dtype: torch.dtype) -> tuple[Transformer, Transformer]:
    model, twin = init_weights(Transformer(MODEL, dtype), seed=0), Transformer(MODEL, dtype)
    twin.load_state_dict(model.state_dict())
    return model, twin


def matrices(model: Transformer, of_gradients: bool = False) -> list[Tensor]:
    params, split = dict(model.named_parameters()), hidden_matrices(model)
    tensors = {name: params[name].grad if of_gradients else params[name].detach() for name in split}
    return [view for name, rows in split.items() for view in split_matrices(tensors[name], rows)]  # type: ignore[arg-type]


def plain_muon(weight: Tensor, gradients: list[Tensor], lr: float, cfg: OptimizerConfig) -> Tensor:
    """A matrix after these gradients, by the definition, in float64."""
    w, momentum = weight.double(), torch.zeros_like(weight, dtype=torch.float64)
    for gradient in gradients:
        momentum = cfg.momentum * momentum + (1 - cfg.momentum) * gradient.double()
        x = cfg.momentum * momentum + (1 - cfg.momentum) * gradient.double()
        x = x / x.norm()
        for _ in range(5):
            gram = x @ x.T
            x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
        w = w * (1 - lr * cfg.weight_decay) - lr * 0.2 * max(x.shape) ** 0.5 * x
    return w


def test_muon_in_bf16_equals_torchs_on_each_matrix() -> None:
    model, twin = two_models(torch.bfloat16)
    ours = Optimizer(CFG, model)
    views = matrices(twin)
    theirs = torch.optim.Muon(views, lr=0.01, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for seed in range(3):
        for module in (model, twin):
            with_gradients(module, seed)
        for view, gradient in zip(views, matrices(twin, of_gradients=True), strict=True):
            view.grad = gradient
        before = [view.clone() for view in views]
        ours.clip()
        ours.step(0.01)
        theirs.step()
        for mine, its, old in zip(matrices(model), views, before, strict=True):
            assert float((mine - its).norm()) < 0.02 * float((its - old).norm())


def test_muon_in_fp32_equals_the_definition_in_float64() -> None:
    model, _ = two_models(torch.float32)
    before = [matrix.clone() for matrix in matrices(model)]
    gradients: list[list[Tensor]] = [[] for _ in before]
    optimizer = Optimizer(CFG, model)
    for seed in range(3):
        with_gradients(model, seed)
        for kept, gradient in zip(gradients, matrices(model, of_gradients=True), strict=True):
            kept.append(gradient.clone())
        optimizer.clip()
        optimizer.step(0.01)
    for old, kept, new in zip(before, gradients, matrices(model), strict=True):
        expected = plain_muon(old, kept, 0.01, CFG)
        assert float((new - expected).abs().max()) < 1e-5 * float(expected.abs().max())


@given(
    shapes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=12),
    at_once=st.integers(1, 300),
)
def test_every_matrix_is_updated_once_whatever_the_shapes_and_the_size_of_a_batch(
    shapes: list[tuple[int, int]], at_once: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(muon.BATCH_NUMEL, "cpu", at_once)
        batches = list(muon.batches(shapes, "cpu"))
        assert sorted(number for _, numbers in batches for number in numbers) == list(range(len(shapes)))
        for (few, many), numbers in batches:
            assert len(numbers) == 1 or few * many * len(numbers) <= at_once
            assert all(sorted(shapes[number]) == [few, many] for number in numbers)
        torch.manual_seed(0)
        weights, updates = ([torch.randn(shape, dtype=torch.float64) for shape in shapes] for _ in range(2))
        cfg = OptimizerConfig(momentum=0.0)
        expected = [plain_muon(w, [u], 0.1, cfg) for w, u in zip(weights, updates, strict=True)]
        muon.update_matrices(weights, updates, 0.1, torch.float64)
    for weight, its in zip(weights, expected, strict=True):
        assert torch.allclose(weight, its, rtol=0, atol=1e-9)


def test_a_matrix_without_gradient_stays() -> None:
    model, twin = two_models(torch.bfloat16)
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    Optimizer(OptimizerConfig(name="muon", lr=0.01), model).step(0.01)
    assert all(torch.equal(a, b) for a, b in zip(matrices(model), matrices(twin), strict=True))


def test_weight_decay_spares_what_adamw_keeps_beside_muon() -> None:
    model, twin = two_models(torch.float32)
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    Optimizer(CFG, model).step(0.5)
    for name, param in model.named_parameters():
        shrunk = 1 - 0.5 * CFG.weight_decay if name in hidden_matrices(model) else 1.0
        assert torch.allclose(param, twin.get_parameter(name) * shrunk, rtol=1e-6)


def test_beside_muon_the_other_parameters_take_an_adamw_step_at_their_own_rate() -> None:
    """Embeddings, norms and routers: torch's AdamW without decay, at `embedding_lr_ratio` times the rate."""
    model, twin = two_models(torch.float32)
    cfg = replace(CFG, embedding_lr_ratio=0.3, beta1=0.8, beta2=0.99)
    optimizer = Optimizer(cfg, model)
    others = {name: param for name, param in twin.named_parameters() if name not in hidden_matrices(twin)}
    theirs = torch.optim.AdamW(others.values(), lr=0.3 * 0.01, betas=(0.8, 0.99), eps=1e-10, weight_decay=0.0)
    for seed in range(3):
        for module in (model, twin):
            with_gradients(module, seed)
        optimizer.clip()
        optimizer.step(0.01)
        theirs.step()
    for name, param in others.items():
        assert torch.allclose(model.get_parameter(name), param, rtol=1e-5, atol=1e-7), name


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_of_each_optimizer_has_the_bytes_that_the_planner_is_told(name: str) -> None:
    model, _ = two_models(torch.float32)
    state = Optimizer(OptimizerConfig(name=name), model).state()
    found = {True: 0, False: 0}
    for key, tensor in state.items():
        if not key.startswith("count/"):  # one number per parameter tensor
            found[key.partition("/")[2] in hidden_matrices(model)] += tensor.nbytes
    numels = {True: 0, False: 0}
    for key, param in model.named_parameters():
        numels[key in hidden_matrices(model)] += param.numel()
    cost = OPTIMIZERS[name].cost
    assert found[True] == numels[True] * cost.bytes_per_matrix_parameter
    assert found[False] == numels[False] * cost.bytes_per_parameter


def test_an_optimizer_that_is_not_in_the_table_is_refused_with_those_that_are() -> None:
    with pytest.raises(ValueError, match=r"^name='sgd': input should be 'adamw' or 'muon'$"):
        OptimizerConfig(name="sgd")


@pytest.mark.parametrize(
    ("name", "option"),
    [
        (name, option.name)
        for name, rule in OPTIMIZERS.items()
        for option in fields(OptimizerConfig)
        if option.name not in {"name", "lr", "clip_norm", *rule.options}
    ],
)
def test_an_option_that_an_optimizer_does_not_use_is_refused(name: str, option: str) -> None:
    with pytest.raises(ValueError, match=rf"^{option}=0.5 belongs to .* and {name} does not use it: set it to"):
        OptimizerConfig(name=name, **{option: 0.5})  # type: ignore[arg-type]


@pytest.mark.parametrize("setting", ["embedding_lr_ratio", "momentum"])
def test_a_setting_of_muon_is_refused_beside_adamw(setting: str) -> None:
    OptimizerConfig(name="muon", **{setting: 0.5})
    with pytest.raises(ValueError, match=rf"^{setting}=0.5 belongs to muon and adamw does not use it: set it to"):
        OptimizerConfig(name="adamw", **{setting: 0.5})


def test_muon_sees_each_expert_and_each_of_q_k_v_as_a_matrix_of_its_own() -> None:
    model = Transformer(MODEL)
    split = hidden_matrices(model)
    params = dict(model.named_parameters())
    shapes = [tuple(m.shape) for name in split for m in split_matrices(params[name], split[name])]
    per_layer = [(32, 32), (16, 32), (16, 32), (32, 32)] + [(48, 32)] * 12
    assert sorted(shapes) == sorted(per_layer * 2)
    assert not any("router" in name or "norm" in name or "wte" in name or "lm_head" in name for name in split)


@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_an_adamw_step_equals_torchs_plain_adamw(scale: float) -> None:
    """Gradients of a millionth are still far above epsilon."""
    model, reference = init_weights(Transformer(MODEL), seed=0), Transformer(MODEL)
    reference.load_state_dict(model.state_dict())
    cfg = OptimizerConfig(name="adamw", lr=0.01, clip_norm=1e9, weight_decay=0.1, beta1=0.8, beta2=0.99)
    ours = Optimizer(cfg, model)
    theirs = torch.optim.AdamW(reference.parameters(), lr=0.01, betas=(0.8, 0.99), eps=1e-10, weight_decay=0.1)
    for seed in range(3):
        for module in (model, reference):
            with_gradients(module, seed, scale)
        ours.clip()
        ours.step(0.01)
        theirs.step()
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_an_optimizers_state_survives_saving_by_name() -> None:
    model = init_weights(Transformer(MODEL), seed=0)
    optimizer = Optimizer(OptimizerConfig(name="muon", lr=0.01), model)
    with_gradients(model, 0)
    optimizer.clip()
    optimizer.step(0.01)
    saved = {name: tensor.clone() for name, tensor in optimizer.state().items()}
    twin = Transformer(MODEL)
    twin.load_state_dict(model.state_dict())
    restored = Optimizer(OptimizerConfig(name="muon", lr=0.01), twin)
    for name, tensor in restored.state().items():
        tensor.copy_(saved[name])
    for module, its in ((model, optimizer), (twin, restored)):
        with_gradients(module, 5)
        its.clip()
        its.step(0.01)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)
