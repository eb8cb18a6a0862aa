"""Codecs: round trips within their error, the same fold as of what was decoded, and forged payloads refused."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from fedloom.serialization import crew
from fedloom.serialization.elements import BLOCK
from fedloom.serialization.errors import CodecError, JobError, LayoutError, PayloadError, ValuesError
from fedloom.serialization.fold import Fold
from fedloom.serialization.foldplan import FoldPlan
from fedloom.serialization.header import build_header
from fedloom.serialization.model import FLModel
from fedloom.serialization.narrowing import CODED, GROUP, SCALE_PREFIX, check_codec
from fedloom.serialization.payload import EncodedModel, decode_model, encode_model, layout_of
from hypothesis import given, settings
from hypothesis import strategies as st

STEPS = "NUM_STEPS_CURRENT_ROUND"
RNG = np.random.default_rng(5)
BASE: dict[str, Any] = {
    "z.big": RNG.standard_normal((2, BLOCK + 100)).astype(np.float32),
    "a.wide": RNG.standard_normal((3, 5 * GROUP + 7)),
    "bias": RNG.standard_normal(9).astype(np.float32),
    "half": RNG.standard_normal(999).astype(np.float16),
    "brain": RNG.standard_normal(300).astype(ml_dtypes.bfloat16),
    "n": np.arange(700),
    "i8": np.arange(-128, 128, dtype=np.int8),
    "flag": np.array([True, False]),
    "none": np.empty((0, 3), np.float32),
}
codecs = pytest.mark.parametrize("codec", list(CODED))


def changed(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        name: value if value.dtype.kind in "ib" else (value + rng.standard_normal(value.shape) / 8).astype(value.dtype)
        for name, value in BASE.items()
    }


def encode(params: dict[str, Any], codec: str = "", steps: int = 3) -> EncodedModel:
    return encode_model(FLModel(params=params, meta={STEPS: steps}), codec=codec)


def partial(fold: Fold) -> bytes:
    return b"".join(fold.to_partial()[0])


@codecs
def test_round_trip_keeps_types_order_and_values_within_the_error(codec: str) -> None:
    encoded = encode(BASE, codec)
    blob = encoded.tobytes()
    assert encoded.tobytes() == encode(BASE, codec).tobytes()
    assert encoded.header.by_name["z.big"].dtype == CODED[codec]
    assert len(blob) < len(encode(BASE).tobytes()) * (0.6 if codec != "int8" else 0.35)
    back = decode_model(blob).params
    assert list(back) == list(BASE)
    for name, value in BASE.items():
        assert (back[name].dtype, back[name].shape) == (value.dtype, value.shape)
        if name not in ("z.big", "a.wide", "bias") or (codec == "int8" and name == "bias"):
            assert back[name].tobytes() == value.tobytes()
    flat = BASE["z.big"].reshape(-1)
    error = np.abs(back["z.big"].reshape(-1) - flat)
    if codec == "int8":
        for first in (0, GROUP * 7, flat.size // GROUP * GROUP):
            group = slice(first, first + GROUP)
            assert error[group].max() <= np.abs(flat[group]).max() / 127 * 0.501
    else:
        assert (error <= np.abs(flat) * 2.0 ** (-11 if codec == "fp16" else -8) + 2.0**-25).all()
    assert layout_of(encoded.header) == layout_of(encode(BASE).header)


@settings(max_examples=12, deadline=None)
@given(
    codec=st.sampled_from(list(CODED)),
    sizes=st.lists(st.integers(500, 90_000), min_size=1, max_size=8),
    cut=st.integers(0, 3),
)
def test_a_fold_of_coded_results_is_one_of_decoded_ones(codec: str, sizes: list[int], cut: int) -> None:
    plan = FoldPlan.first(BASE, tasks=3, codec=codec)
    plain, coded = Fold(plan), Fold(plan)
    for seed in range(3):
        params = changed(seed)
        if seed == cut:
            del params["a.wide"]
        encoded = encode(params, codec, steps=seed + 1)
        plain.add(encode(decode_model(encoded.tobytes()).params, steps=seed + 1), site=f"site-{seed}")
        if seed:  # in pieces that end anywhere, within scales and groups too
            data = encoded.tobytes()[encoded.header.data_start :]
            feeder = coded.start(encoded.header, site=f"site-{seed}", meta=encoded.meta)
            turn = 0
            while feeder.missing:
                feeder.feed(feeder.position, data[feeder.position : feeder.position + sizes[turn % len(sizes)]])
                turn += 1
            feeder.finish()
        else:
            coded.add(encoded, site="site-0")
    assert partial(coded) == partial(plain)
    merged = Fold(plan)
    merged.merge(partial(coded))
    for fold in (coded, merged):
        made, expected = fold.finish(BASE).params, plain.finish(BASE).params
        assert all(made[name].tobytes() == expected[name].tobytes() for name in BASE)
    coded.remove(encode({k: v for k, v in changed(1).items() if cut != 1 or k != "a.wide"}, codec, 2), site="site-1")
    assert coded.count == 2


@codecs
def test_threads_float_sums_and_mixed_results(codec: str) -> None:
    items = ((8 << 20) + (1 << 18)) // (1 if codec == "int8" else 2)  # over what threads are worthwhile for
    base = {"w": np.resize(BASE["z.big"].reshape(-1), items)}
    blob = encode(base, codec).tobytes()
    mean = decode_model(blob).params["w"]
    made: list[Any] = []
    for allowed, exact, source in ((1, True, blob), (2, True, blob), (1, True, None), (2, False, blob)):
        crew.allow(allowed)
        fold = Fold(FoldPlan.first(base, tasks=2, exact=exact, codec=codec))
        fold.add(encode({"w": mean}) if source is None else source, site="a")
        fold.add(encode({"w": base["w"]}), site="b")  # uncoded, beside it
        crew.allow(1)
        made.append(fold.finish(base).params["w"])
    for other in made[1:3]:
        assert np.array_equal(made[0].view(np.uint32), other.view(np.uint32))
    assert float(np.abs(made[3] - made[0]).max()) < 1e-6


def forged(values: Any, scales: Any, *, name: str = "w") -> bytes:
    """An int8 payload of one tensor, as somebody else wrote it."""
    specs = [(name, "I8", values.shape)]
    tensors = {name: values}
    if scales is not None:
        specs.append((SCALE_PREFIX + "w", "F32", scales.shape))
        tensors[SCALE_PREFIX + "w"] = scales
    header, head = build_header(specs)
    return head + b"".join(tensors[t.name].tobytes() for t in header.tensors)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -0.5, 1 / 3, 1e-40, 1e38])
def test_scales_that_no_encoder_makes_are_refused(bad: float) -> None:
    base = {"v": np.ones(3), "w": np.ones(3 * GROUP, np.float32)}
    fold = Fold(FoldPlan.first(base, tasks=2, codec="int8"))
    fold.add(encode(base, "int8"), site="a")
    before, meta = partial(fold)[-8 * 3 * GROUP :], {"meta": {STEPS: 3}}
    scales = np.array([1, bad, 0.25], np.float32)
    with pytest.raises(ValuesError, match=r"site-9: '__scale__.w' holds scales"):
        fold.add(forged(np.ones(3 * GROUP, np.int8), scales), site="site-9", meta=meta)
    assert partial(fold)[-8 * 3 * GROUP :] == before  # the sums
    assert fold.count == 1
    good = Fold(fold.plan)
    good.add(forged(np.full(3 * GROUP, -128, np.int8), np.array([1, 0, 0.25], np.float32)), site="b", meta=meta)
    assert good.finish(base).params["w"][[0, GROUP, -1]].tolist() == [-128, 0, -32]


@pytest.mark.parametrize(
    ("values", "scales", "name", "said"),
    [
        (np.ones(3 * GROUP, np.int8), None, "w", "its scales do not lie before it"),
        (np.ones(3 * GROUP, np.int8), np.ones(2, np.float32), "w", "which no tensor's scales are"),
        (np.ones(2 * GROUP, np.int8), np.ones(3, np.float32), "w", r"'w' is I8\[512\], the model's is F32\[768\]"),
        (np.ones(4, np.int8), np.ones(3, np.float32), "i", "'__scale__.w' has no I8 tensor behind it"),
    ],
)
def test_forged_layouts_are_refused(values: Any, scales: Any, name: str, said: str) -> None:
    base = {"w": np.ones(3 * GROUP, np.float32), "i": np.ones(4, np.int8)}
    fold = Fold(FoldPlan.first(base, tasks=2, codec="int8"))
    with pytest.raises(LayoutError, match=said):
        fold.add(forged(values, scales, name=name), site="a")
    assert fold.count == 0


def test_a_codec_that_was_not_agreed_on_is_refused() -> None:
    base = {"w": np.ones(3 * GROUP, np.float32)}
    for agreed, sent in (("", "fp16"), ("", "int8"), ("bf16", "fp16"), ("fp16", "int8")):
        fold = Fold(FoldPlan.first(base, tasks=2, codec=agreed))
        with pytest.raises(LayoutError, match="result of a does not fit"):
            fold.add(encode(base, sent), site="a")
    with pytest.raises(JobError, match=r"codec='zip'; allowed are None, 'fp16', 'bf16', 'int8'"):
        check_codec("zip")


def test_values_that_a_codec_cannot_hold_are_refused() -> None:
    with pytest.raises(ValuesError, match=r"'w' reaches 70000.0, which fp16 cannot hold.*codec='bf16'"):
        encode({"w": np.array([1, -7e4], np.float32)}, "fp16")
    with pytest.raises(ValuesError, match="int8 cannot hold"):
        encode({"w": np.full(GROUP, 3e38, np.float32)}, "int8")
    with pytest.raises(ValuesError, match="bf16 cannot hold"):
        encode({"w": np.full(2, 1e300)}, "bf16")
    with pytest.raises(LayoutError, match="are the codec's"):
        encode({"__scale__.w": np.ones(3, np.float32)}, "fp16")


def test_descriptions_that_no_encoder_makes_are_refused() -> None:
    def described(text: str) -> bytes:
        header, head = build_header([("w", "I8", (GROUP,))], {"fedloom": text})
        return head + bytes(header.data_bytes)

    for text, said in (
        ('{"codec":"zip","coded":{}}', "this version knows fp16, bf16, int8"),
        ('{"codec":"int8"}', "does not say which"),
        ('{"codec":"int8","coded":{"F32":[1]}}', "where there is none"),
        ('{"codec":"int8","coded":{"F32":[0]}}', "not as codec int8 makes it"),
    ):
        with pytest.raises(PayloadError, match=said):
            decode_model(described(text))


def test_a_plan_says_its_codec_in_a_format_of_its_own() -> None:
    plan = FoldPlan.first({"w": np.ones(3)}, tasks=1, codec="bf16")
    assert FoldPlan.from_bytes(plan.to_bytes()) == plan
    assert b"fedloom-fold/2" in plan.to_bytes()
    with pytest.raises(CodecError, match="codec"):
        FoldPlan.from_bytes(plan.to_bytes().replace(b"bf16", b"bf17"))
    plain = FoldPlan.first({"w": np.ones(3)}, tasks=1)
    assert b"codec" not in plain.to_bytes()
    assert b"fedloom-fold/1" in plain.to_bytes()
