"""Skip-Cache by hooks: what runs, what comes out, and that nothing leaks into another evaluation, run or model."""

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion.caching import CacheSchedule, skip_cache_flags
from sampling.diffusers_cache import LAYOUTS, enable_skip_cache, parse_skip_cache
from tests.diffusers_parts import CLASSES, count_blocks, lists_of_blocks, tiny_inputs, tiny_transformer

TIMES = (951, 751, 651, 551, 451, 351, 251, 151, 51, 1)
every_class = pytest.mark.parametrize("name", CLASSES)
pytestmark = pytest.mark.filterwarnings("error")


@torch.no_grad()
def evaluate(transformer: Any, t: float | Sequence[float], inputs: dict[str, Any]) -> Tensor:
    rows = len(inputs["hidden_states"])
    timestep = torch.tensor([t] * rows if isinstance(t, int | float) else t, dtype=torch.float32)
    return transformer(**inputs, timestep=timestep).sample


def samples(inputs: dict[str, Any], seed: int) -> dict[str, Any]:
    """The same conditioning with other samples."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return {**inputs, "hidden_states": torch.randn(inputs["hidden_states"].shape, generator=generator)}


def run(transformer: Any, inputs: dict[str, Any], times: Sequence[float] = TIMES) -> list[Tensor]:
    """Outputs of a run; its samples are random at every step, which shows most what is reused."""
    return [evaluate(transformer, t, samples(inputs, i)) for i, t in enumerate(times)]


def is_equal(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> list[bool]:
    return [torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)]


@every_class
def test_blocks_in_the_middle_do_not_run_and_the_policy_is_the_rule(name: str) -> None:
    transformer = tiny_transformer(name)
    ran, lists = count_blocks(transformer), range(len(lists_of_blocks(transformer)))
    plain = run(transformer, tiny_inputs(name))
    ran.clear()
    cache = enable_skip_cache(transformer, 3, depth=2)
    cached = run(transformer, tiny_inputs(name))
    flags = skip_cache_flags(TIMES, 3, LAYOUTS[name].schedule)
    assert 3 < sum(flags) < len(TIMES)
    ends = (0, 1, 4, 5) if LAYOUTS[name].skips else (4, 5)
    assert ran == [[(k, i) for i in (range(6) if flag else ends) for k in lists] for flag in flags]
    assert is_equal(plain, cached) == list(flags)
    assert (cache.full, cache.reused) == (sum(flags), len(TIMES) - sum(flags))


@every_class
@pytest.mark.parametrize("depth", [1, 2])
def test_a_cached_evaluation_is_a_whole_one_with_other_tokens_in_front_of_the_end(name: str, depth: int) -> None:
    """Ground truth without skipping: all blocks run, and a hook of PyTorch exchanges the tokens."""
    transformer, inputs = tiny_transformer(name), tiny_inputs(name)
    entered, end = [], lists_of_blocks(transformer)[0][6 - depth]
    with end.register_forward_pre_hook(lambda _, args: entered.append(args[0])):
        evaluate(transformer, 600, samples(inputs, 0))
    with end.register_forward_pre_hook(lambda _, args: (entered[0], *args[1:])):
        expected = evaluate(transformer, 500, samples(inputs, 1))
    whole = evaluate(transformer, 500, samples(inputs, 1))
    with enable_skip_cache(transformer, 2, depth=depth) as cache:
        evaluate(transformer, 600, samples(inputs, 0))
        actual = evaluate(transformer, 500, samples(inputs, 1))
    assert cache.reused == 1 and not torch.equal(actual, whole)
    assert torch.equal(actual, expected)


@every_class
def test_an_interval_of_one_and_unchanged_samples_change_nothing(name: str) -> None:
    transformer, inputs = tiny_transformer(name), tiny_inputs(name)
    plain = run(transformer, inputs)
    with enable_skip_cache(transformer, 1):
        assert all(is_equal(run(transformer, inputs), plain))


@every_class
def test_the_published_settings_are_the_defaults(name: str) -> None:
    transformer = tiny_transformer(name, 16 if name == "DiTTransformer2DModel" else 6)
    ran = count_blocks(transformer)
    enable_skip_cache(transformer, 2)
    high, low, depth = (1000, 20, 4) if name == "DiTTransformer2DModel" else (700, 50, 1)
    times = (951, 901, 701, 700, 699, 600, 400, 60, 50, 40, 20, 19)
    run(transformer, tiny_inputs(name), times)
    assert LAYOUTS[name].schedule == CacheSchedule(high, low, True)
    fewest = min(map(len, ran))
    assert fewest == len(lists_of_blocks(transformer)) * depth * (2 if LAYOUTS[name].skips else 1)
    full = [len(blocks) > fewest for blocks in ran]
    assert full == list(skip_cache_flags(times, 2, CacheSchedule(high, low, True)))


@every_class
def test_runs_in_a_row_are_the_same_run(name: str) -> None:
    transformer, inputs = tiny_transformer(name), tiny_inputs(name)
    with enable_skip_cache(transformer, 3):
        first = run(transformer, inputs)
        assert all(is_equal(run(transformer, inputs), first))
        run(transformer, inputs, TIMES[:5])  # stops in the middle, with tokens kept
        assert all(is_equal(run(transformer, inputs), first))


def change(inputs: dict[str, Any], kind: str, name: str) -> dict[str, Any]:
    """Inputs of another run."""
    if kind == "conditioning in place":
        inputs["class_labels" if name == "DiTTransformer2DModel" else "encoder_hidden_states"][0] += 1
        return inputs
    return tiny_inputs(name, *{"rows": (3, 0), "guidance": (4, 0), "conditioning": (2, 5)}[kind])


@every_class
@pytest.mark.parametrize("kind", ["rows", "guidance", "conditioning", "conditioning in place"])
@pytest.mark.parametrize("before", [1, 3])  # evaluations after which the next one would reuse tokens
def test_with_other_inputs_a_run_begins_anew_though_the_timestep_falls(name: str, kind: str, before: int) -> None:
    transformer, inputs = tiny_transformer(name), tiny_inputs(name)
    plain = run(transformer, change(tiny_inputs(name), kind, name), (500, 400))
    with enable_skip_cache(transformer, 2) as cache:
        run(transformer, inputs, (800, 690, 680)[:before])
        assert is_equal(run(transformer, change(inputs, kind, name), (500, 400)), plain) == [True, False]
        assert cache.reused == before // 2 + 1


@every_class
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("place", [0, 3, 5])
@pytest.mark.parametrize("done", [0, 1, 2])
def test_an_evaluation_that_fails_leaves_nothing(name: str, error: type[BaseException], place: int, done: int) -> None:
    transformer, inputs = tiny_transformer(name), tiny_inputs(name)
    plain = run(transformer, inputs, (400, 300))

    def fail(*_: object) -> None:
        raise error("stopped")

    with enable_skip_cache(transformer, 2):
        run(transformer, inputs, (600, 550)[:done])
        with lists_of_blocks(transformer)[0][place].register_forward_pre_hook(fail), pytest.raises(error):
            evaluate(transformer, 500, inputs)
        assert is_equal(run(transformer, inputs, (400, 300)), plain) == [True, False]


@every_class
def test_reset_ends_a_run(name: str) -> None:
    transformer, inputs = tiny_transformer(name), tiny_inputs(name)
    plain = run(transformer, inputs, (400, 300))
    with enable_skip_cache(transformer, 2) as cache:
        run(transformer, inputs, (600,))
        cache.reset()
        assert is_equal(run(transformer, inputs, (400, 300)), plain) == [True, False]


@every_class
def test_interleaved_runs_are_computed_in_full_with_one_warning(name: str) -> None:
    """Two halves of a batch in turn, with the same conditioning: each may only see its own tokens."""
    transformer, inputs = tiny_transformer(name), tiny_inputs(name)
    times = [t for t in (690, 600, 500, 400) for _ in range(2)]
    plain = run(transformer, inputs, times)
    single = run(transformer, inputs, TIMES)
    with enable_skip_cache(transformer, 2) as cache:
        for i in range(2):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                assert all(is_equal(run(transformer, inputs, times), plain))
            assert [("timestep 690 came twice" in str(w.message)) for w in caught] == [True][i:]
        assert cache.reused == 0
        assert not all(is_equal(run(transformer, inputs), single)) and cache.reused > 0  # the timestep rose


@every_class
def test_a_call_past_the_hooks_changes_nothing(name: str) -> None:
    """`forward` itself runs no hooks of PyTorch: everything is computed, and a run in progress stays as it was."""
    transformer, inputs = tiny_transformer(name), tiny_inputs(name)
    plain = evaluate(transformer, 300, samples(inputs, 7))
    with enable_skip_cache(transformer, 2):
        run(transformer, inputs, (600,))
        expected = evaluate(transformer, 500, samples(inputs, 3))
        run(transformer, inputs, (600,))
        past = transformer.forward(**samples(inputs, 7), timestep=torch.full((2,), 300.0)).sample
        assert torch.equal(past, plain)
        assert torch.equal(evaluate(transformer, 500, samples(inputs, 3)), expected)


@every_class
def test_conditional_and_unconditional_calls_in_turn_never_mix(name: str) -> None:
    transformer, both = tiny_transformer(name), (tiny_inputs(name), tiny_inputs(name, seed=5))
    calls = [(t, inputs) for t in (690, 600, 500) for inputs in both]
    plain = [evaluate(transformer, t, inputs) for t, inputs in calls]
    with enable_skip_cache(transformer, 2), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert all(is_equal([evaluate(transformer, t, inputs) for t, inputs in calls], plain))


@every_class
@pytest.mark.parametrize("kind", ["rows with timesteps", "training"])
def test_rows_with_timesteps_of_their_own_and_training_are_computed_in_full(name: str, kind: str) -> None:
    transformer, inputs = tiny_transformer(name), tiny_inputs(name)
    t = (500, 400) if kind == "rows with timesteps" else 500
    plain = [evaluate(transformer, t, inputs), evaluate(transformer, 300, inputs)]
    with enable_skip_cache(transformer, 2) as cache:
        run(transformer, inputs, (600,))
        transformer.train(kind == "training")
        assert torch.equal(evaluate(transformer, t, inputs), plain[0])
        transformer.eval()
        assert torch.equal(evaluate(transformer, 300, inputs), plain[1])
    assert (cache.full, cache.reused) == (3, 0)


@every_class
def test_kept_tokens_carry_no_graph(name: str) -> None:
    transformer, inputs = tiny_transformer(name), tiny_inputs(name)
    with enable_skip_cache(transformer, 2) as cache:
        for t in (600.0, 500.0):
            transformer(**inputs, timestep=torch.full((2,), t)).sample.sum().backward()
    assert cache.reused == 1


@every_class
def test_a_model_without_hooks_is_as_it_was(name: str) -> None:
    transformer, inputs = tiny_transformer(name), tiny_inputs(name)
    plain, weights = run(transformer, inputs), copy.deepcopy(transformer.state_dict())
    attributes = {key: sorted(vars(module)) for key, module in transformer.named_modules()}
    cache = enable_skip_cache(transformer, 2)
    hooked = run(transformer, inputs, TIMES[:5])
    assert list(transformer.state_dict()) == list(weights)
    for _ in range(2):
        cache.remove()
    assert {key: sorted(vars(module)) for key, module in transformer.named_modules()} == attributes
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in transformer.modules())
    assert all(torch.equal(value, weights[key]) for key, value in transformer.state_dict().items())
    assert all(is_equal(run(transformer, inputs), plain))
    with enable_skip_cache(transformer, 2):
        assert all(is_equal(run(transformer, inputs, TIMES[:5]), hooked))
    assert all(is_equal(run(transformer, inputs), plain))


@every_class
def test_a_copy_of_a_model_with_hooks_has_its_own(name: str) -> None:
    transformer, inputs = tiny_transformer(name), tiny_inputs(name)
    cache = enable_skip_cache(transformer, 2)
    cached = run(transformer, inputs)
    other = copy.deepcopy(transformer)
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.zero_()
    cache.remove()
    assert all(is_equal(run(other, inputs), cached))


@every_class
def test_hooks_of_another_library_over_ours_stay_in_place(name: str) -> None:
    """Such as accelerate's, which exchange `forward` as well."""
    transformer, inputs = tiny_transformer(name), tiny_inputs(name)
    plain, calls = run(transformer, inputs), []
    block = lists_of_blocks(transformer)[0][-1]
    for under in (True, False):
        own = block.forward
        if under:
            block.forward = lambda *args, own=own, **kwargs: calls.append(0) or own(*args, **kwargs)
        cache = enable_skip_cache(transformer, 2)
        if not under:
            own = block.forward
            block.forward = lambda *args, own=own, **kwargs: calls.append(0) or own(*args, **kwargs)
        cached = run(transformer, inputs)
        assert len(calls) == len(TIMES) and not all(is_equal(cached, plain))
        cache.remove()
        assert all(is_equal(run(transformer, inputs), plain)) and len(calls) == 2 * len(TIMES)
        calls.clear()
        del block.forward


@pytest.mark.slow
@every_class
@pytest.mark.parametrize("blockwise", [False, True])
def test_a_compiled_model_gives_the_same(name: str, blockwise: bool) -> None:
    torch.compiler.reset()  # the number of graphs of one function is limited
    transformer, inputs = tiny_transformer(name, 4), tiny_inputs(name)
    plain, names = run(transformer, inputs), list(transformer.state_dict())
    cache = enable_skip_cache(transformer, 3, depth=1)
    cached = run(transformer, inputs)
    counts = (cache.full, cache.reused)
    compiled = transformer if blockwise else torch.compile(transformer, backend="eager")
    for block in (block for blocks in lists_of_blocks(transformer) for block in blocks if blockwise):
        block.compile(backend="eager", fullgraph=True)
    for ours, theirs in zip(run(compiled, inputs), cached, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert (cache.full, cache.reused) == (2 * counts[0], 2 * counts[1]) and counts[1] > 0
    assert list(transformer.state_dict()) == names
    cache.remove()
    for ours, theirs in zip(run(compiled, inputs), plain, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_what_cannot_be_cached_is_refused() -> None:
    transformer = tiny_transformer("HunyuanDiT2DModel")
    with pytest.raises(ValueError, match="Linear is not one of HunyuanDiT2DModel, Latte"):
        enable_skip_cache(torch.nn.Linear(1, 1), 2)
    with pytest.raises(ValueError, match="the refresh interval must be at least 1, not 0"):
        enable_skip_cache(transformer, 0)
    for depth in (0, 3):
        with pytest.raises(ValueError, match=f"depth {depth} must be at least 1 and less than half of the 6 blocks"):
            enable_skip_cache(transformer, 2, depth=depth)
    with pytest.raises(ValueError, match="the bounds 50 and 700 must be timesteps"):
        enable_skip_cache(transformer, 2, 50, 700)
    with enable_skip_cache(transformer, 2), pytest.raises(ValueError, match="has Skip-Cache already"):
        enable_skip_cache(transformer, 2)
    with pytest.raises(ValueError, match="is compiled"):
        enable_skip_cache(torch.compile(transformer, backend="eager"), 2)


def test_settings_in_the_released_notation() -> None:
    assert parse_skip_cache("N2-700-50") == {"interval": 2, "t_high": 700, "t_low": 50}
    for text in ("2", "N2-700", "N2-700-50-1", "N-2-700-50", "N2-700-x"):
        with pytest.raises(ValueError, match="must be N-HIGH-LOW"):
            parse_skip_cache(text)
    with pytest.raises(ValueError, match="interval must be at least 1, not 0"):
        parse_skip_cache("N0-700-50")
    with pytest.raises(ValueError, match="the bounds 50 and 700 must be timesteps"):
        parse_skip_cache("N2-50-700")
