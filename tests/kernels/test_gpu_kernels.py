"""The GPU path, as far as a machine without a GPU can tell: Triton's interpreter, its compiler, and the plumbing.

Whether the kernels are right is asked in gpu_kernels_checks.py, in a process of its own: the interpreter must be
chosen before Triton is first imported.
"""

import importlib
import importlib.util
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gristmill.errors import InputError
from gristmill.kernels.attention import document_starts, packed_attention_reference

CHECKS = Path(__file__).with_name("gpu_kernels_checks.py")
attention = importlib.import_module("gristmill.kernels.gpu.attention")
gpu_experts = importlib.import_module("gristmill.kernels.gpu.experts")


@pytest.fixture
def triton() -> Any:
    """Triton, or a skip that says so; a failure where the environment names it as required."""
    if importlib.util.find_spec("triton") is None:
        if "triton" in os.environ.get("GRISTMILL_REQUIRE", "").split(","):
            pytest.fail("GRISTMILL_REQUIRE names triton, and it is not installed")
        pytest.skip("not run: Triton is not installed, so the GPU kernels were not checked")
    return importlib.import_module("triton")


def run_checks(env: dict[str, str]) -> None:
    command = [sys.executable, "-m", "pytest", str(CHECKS), "-q", "-p", "no:cacheprovider"]
    result = subprocess.run(command, env=os.environ | env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-1000:]


def test_gpu_kernels_match_float64_references_in_tritons_interpreter(triton: Any) -> None:
    run_checks({"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"})


@pytest.mark.gpu
def test_gpu_kernels_match_float64_references_on_the_gpu(triton: Any) -> None:
    if not torch.cuda.is_available():
        pytest.skip("not run: there is no GPU")
    run_checks({"TRITON_INTERPRET": "0"})


POINTERS = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64"}


def compile_launches(
    triton: Any, capability: int, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> dict[str, list[Any]]:
    """From now on a launch compiles its kernel for that GPU, with its own block sizes, and runs nothing."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    compiled: dict[str, list[Any]] = {}
    seen = set()

    def launch(kernel: Any, *args: Any, grid: Any, warmup: bool, **named: Any) -> None:
        options = {name: named.pop(name) for name in [*named] if name not in kernel.arg_names}
        values = dict(zip(kernel.arg_names, args, strict=False)) | named
        signature, constants, attributes = {}, {}, {}
        for place, (name, param) in enumerate(zip(kernel.arg_names, kernel.params, strict=True)):
            value = values[name]
            if param.is_constexpr or (isinstance(value, int) and value == 1):
                signature[name], constants[place,] = "constexpr", value
            elif isinstance(value, int | float):
                signature[name] = "i32" if isinstance(value, int) else "fp32"
            else:
                signature[name], attributes[place,] = POINTERS[value.dtype], [["tt.divisibility", 16]]
        key = (kernel.__name__, *signature.items(), *constants.items())
        if key not in seen:
            seen.add(key)
            source, target = ASTSource(kernel, signature, constants, attributes), GPUTarget("cuda", capability, 32)
            binary = triton.compile(source, target=target, options=options)
            compiled.setdefault(kernel.__name__, []).append(binary)

    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder))
    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", launch)
    return compiled


@pytest.mark.parametrize(("capability", "shared_bytes"), [(80, 163 * 1024), (90, 227 * 1024)])
def test_the_kernels_compile_for_a100_and_h100_and_fit_their_shared_memory(
    triton: Any, capability: int, shared_bytes: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("not run: TRITON_INTERPRET=1 leaves nothing to compile")
    from gristmill.kernels.gpu.loss import loss_and_gradient
    from gristmill.kernels.gpu.rotary import rotate

    compiled = compile_launches(triton, capability, monkeypatch, tmp_path)
    monkeypatch.setattr(gpu_experts, "torch_multiplies", lambda x, widths: False)
    weights, ids = torch.rand(600, 1), torch.zeros(600, 1, dtype=torch.long)
    x = torch.zeros(600, 256, dtype=torch.bfloat16, requires_grad=True)
    masters = [torch.zeros(1, 384, 256, requires_grad=True) for _ in range(3)]
    gpu_experts.experts(x, weights.requires_grad_(), ids, *masters).sum().backward()
    loss_and_gradient(torch.zeros(2, 100352, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.long))
    heads = torch.zeros(1, 2, 8, 128, dtype=torch.bfloat16, requires_grad=True)
    rotate(heads, torch.ones(1, 2, 1, 64), torch.ones(1, 2, 1, 64), 6, 8.0).sum().backward()
    names = {"_gather", "_combine", "_glu", "_glu_backward", "_grouped_rows", "_grouped_weights", "_loss", "_rotate"}
    assert compiled.keys() == names
    assert all(binary.metadata.shared <= shared_bytes for binaries in compiled.values() for binary in binaries)
    if capability == 90:  # bf16 reaches Hopper's matrix units
        assert all("wgmma.mma" in binary.asm["ptx"] for binary in compiled["_grouped_rows"])


@given(
    T=st.integers(1, 60),
    E=st.integers(1, 300),
    K=st.integers(1, 4),
    tile=st.sampled_from([16, 64]),
    seed=st.integers(0, 99),
)
def test_a_plan_gives_each_assignment_one_row_of_its_expert_in_order(
    T: int, E: int, K: int, tile: int, seed: int
) -> None:
    torch.manual_seed(seed)
    ids = torch.stack([torch.randperm(E)[: min(K, E)] for _ in range(T)]) // (1 + seed % 3)  # the last ones get none
    plan = gpu_experts.make_plan(ids, E, tile, False)
    ends, source = [0, *plan.ends_E.tolist()], plan.source_P.tolist()
    expected: list[int] = []
    for expert in range(E):
        mine = [place for place, chosen in enumerate(ids.flatten().tolist()) if chosen == expert]
        rows = max(tile, -(-len(mine) // tile) * tile)  # an expert without tokens has a tile of padding
        expected += [*mine, *[-1] * (rows - len(mine))]
        assert ends[expert + 1] == len(expected)
    assert source == expected + [-1] * (len(source) - len(expected))
    assert len(source) % tile == 0
    assert [source[slot] for slot in plan.slot_TK.flatten().tolist()] == list(range(ids.numel()))


@given(
    lengths=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=8), min_size=1, max_size=4),
)
def test_document_bounds_are_the_running_sums_of_the_documents_lengths(lengths: list[list[int]]) -> None:
    S = max(map(sum, lengths))
    rows = [[*row, *([S - sum(row)] if sum(row) < S else [])] for row in lengths]
    ids = torch.tensor([[number for number, length in enumerate(row) for _ in range(length)] for row in rows])
    flat = [length for row in rows for length in row]
    expected = [sum(flat[:n]) for n in range(len(flat) + 1)]
    its = attention.segments(document_starts(ids), S)
    assert its.queries_N.dtype == its.keys_N.dtype == torch.int32
    assert its.queries_N.tolist() == its.keys_N.tolist() == expected
    assert its.seen is None


@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=8), min_size=1, max_size=4), st.data())
def test_the_last_queries_see_of_each_document_what_lies_before_them(lengths: list[list[int]], data: Any) -> None:
    S = max(map(sum, lengths))
    rows = [[*row, *([S - sum(row)] if sum(row) < S else [])] for row in lengths]
    ids = torch.tensor([[number for number, length in enumerate(row) for _ in range(length)] for row in rows])
    Q = data.draw(st.integers(1, S - 1)) if S > 1 else 1
    its = attention.segments(document_starts(ids), Q)
    queries, keys, seen = [0], [0], []
    for number, row in enumerate(ids.tolist()):
        for document in dict.fromkeys(row[S - Q :]):
            places = [place for place, its_document in enumerate(row) if its_document == document]
            queries.append(queries[-1] + sum(place >= S - Q for place in places))
            keys.append(keys[-1] + len(places))
            seen += [number * S + place for place in places]
    assert its.queries_N.tolist() == queries
    assert its.keys_N.tolist() == keys
    assert (list(range(len(rows) * S)) if its.seen is None else its.seen.tolist()) == seen


def plain_varlen(
    q: Tensor, k: Tensor, v: Tensor, queries: Tensor, keys: Tensor, *_: Any, window_size: Any, **__: Any
) -> Tensor:
    """What torch's documentation says of `varlen_attn` with a causal window, a document at a time: the window ends at
    the last query and the last key."""
    assert window_size == (-1, 0)
    out = []
    spans = [list(pairwise(bounds.tolist())) for bounds in (queries, keys)]
    for (q_start, q_end), (k_start, k_end) in zip(*spans, strict=True):
        one = [x[None, a:b].transpose(1, 2).double() for x, a, b in ((q, q_start, q_end), (k, k_start, k_end))]
        one.append(v[None, k_start:k_end].transpose(1, 2).double())
        seen = torch.ones(q_end - q_start, k_end - k_start).tril(k_end - k_start - (q_end - q_start)).bool()
        out.append(torch.nn.functional.scaled_dot_product_attention(*one, attn_mask=seen, enable_gqa=True)[0])
    return torch.cat(out, dim=1).transpose(0, 1).to(q.dtype)


def test_attention_hands_each_document_to_torchs_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "varlen_attn", plain_varlen)
    torch.manual_seed(0)
    starts = document_starts((torch.rand(3, 50) < 0.1).cumsum(1))
    wide = torch.randn(3, 50, 8, 16).bfloat16()
    q, k, v = wide.split((4, 2, 2), dim=2)  # slices of one projection, as in the model
    ours = attention.packed_attention(q, k, v, starts)
    exact = packed_attention_reference(*(x.double() for x in (q, k, v)), starts)
    assert ours.shape == q.shape
    assert float((ours.double() - exact).abs().max()) < 0.01
    last = attention.packed_attention(q[:, -20:], k, v, starts)
    assert float((last.double() - exact[:, -20:]).abs().max()) < 0.01
    wide32 = packed_attention_reference(*(x.float() for x in (q, k, v)), starts)
    assert torch.equal(attention.packed_attention(q.float(), k.float(), v.float(), starts), wide32)


def test_without_triton_all_imports_work_and_the_first_use_names_what_to_install() -> None:
    script = """if True:
        import sys; sys.modules["triton"] = None
        import torch, gristmill.kernels.experts, gristmill.kernels.loss
        from gristmill.kernels.gpu import attention, experts, loss, rotary
        loss.loss_and_gradient(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long))"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.stderr.splitlines()[-1].startswith("gristmill.errors.InputError: training on CUDA needs Triton")
    assert "pip install 'gristmill[gpu]'" in result.stderr


def test_a_dtype_that_the_kernels_would_round_is_refused() -> None:
    from gristmill.kernels.gpu.lazy import kernels_for

    with pytest.raises(InputError, match=r"torch\.float64 on cpu: the GPU kernels take bfloat16 and float32"):
        kernels_for(torch.zeros(1, dtype=torch.float64))
