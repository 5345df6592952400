"""Merging modules into runs: what is computed stays the same, whatever the chain."""

from __future__ import annotations

from collections.abc import Mapping

from hypothesis import given
from hypothesis import strategies as st

from paceline.core.bind import bind
from paceline.core.chain import Chain, Module, Source
from paceline.core.model import ModelSpec
from paceline.core.runs import merge, modules_in, run_spec, runs_of
from paceline.core.tensor import TensorSpec

BOOL = TensorSpec("ok", "BOOL", (1,))

MODELS = {
    f"{kind}{rows}": ModelSpec(
        f"{kind}{rows}",
        rows,
        tuple(TensorSpec(name, "INT8", (2,)) for name in "ab"[: 1 + (kind == "two")]),
        (TensorSpec("p", "INT8", (2,)), TensorSpec("q", "INT8", (2,)), BOOL),
    )
    for kind in ("one", "two")
    for rows in (0, 4, 8)
}


@st.composite
def chains(draw: st.DrawFn) -> Chain:
    """A chain of up to eight modules over two inputs; most lean on the one before."""
    modules: list[Module] = []
    known = [Source(None, "x"), Source(None, "z")]
    for index in range(draw(st.integers(1, 8))):
        model = draw(st.sampled_from(sorted(MODELS)))
        recent = known[-2:] if draw(st.booleans()) else known
        sources = st.sampled_from(recent if draw(st.booleans()) else known)
        inputs = {tensor.name: draw(sources) for tensor in MODELS[model].inputs}
        before = [m.name for m in modules]
        rare = draw(st.integers(0, 9))
        when = Source(draw(st.sampled_from(before)), "ok") if before and rare == 0 else None
        modules.append(
            Module(
                f"m{index}",
                model,
                inputs,
                when=when,
                fan_out=0.5 if when else 1.0,
                on_error="skip" if rare == 1 else "fail",
            )
        )
        known += [Source(f"m{index}", "p"), Source(f"m{index}", "q")]
    outputs = draw(st.lists(st.sampled_from(known[2:]), min_size=1, max_size=3, unique=True))
    return Chain(
        "c",
        1.0,
        (TensorSpec("x", "INT8", (2,)), TensorSpec("z", "INT8", (2,))),
        tuple(modules),
        {f"o{number}": source for number, source in enumerate(outputs)},
        runs="auto",
    )


def meaning(source: Source, modules: Mapping[str, Module]) -> object:
    """What a tensor is, as a term over the chain's inputs; runs are looked into."""
    if source.module is None:
        return source.tensor
    module = modules[source.module]
    if module.members:
        inside = {member.name: member for member in module.members}
        return meaning(Source(module.members[-1].name, source.tensor), {**modules, **inside})
    inputs = tuple((name, meaning(s, modules)) for name, s in sorted(module.inputs.items()))
    condition = None if module.when is None else meaning(module.when, modules)
    return (module.model, source.tensor, inputs, condition, module.on_error)


@given(chains())
def test_the_merged_chain_computes_what_the_declared_one_computes(chain: Chain) -> None:
    runs = runs_of(chain)
    merged = merge(chain, runs)
    before = {m.name: m for m in chain.modules}
    after = {m.name: m for m in merged.modules}
    # Members name what is outside of their run as it was declared.
    after |= {run.members[-1].name: run for run in runs}
    assert merged.outputs.keys() == chain.outputs.keys()
    for name in chain.outputs:
        assert meaning(merged.outputs[name], after) == meaning(chain.outputs[name], before)
    assert sorted(n for m in merged.modules for n in modules_in(m.name)) == sorted(before)
    assert runs_of(merged) == (), "they were as long as they could be"


@given(chains())
def test_a_run_waits_for_nothing_but_what_its_first_module_waits_for(chain: Chain) -> None:
    exposed = {source.module for source in chain.outputs.values()}
    for run in runs_of(chain):
        first, *others = run.members
        assert run.parents == first.parents and len(run.members) > 1
        for before, member in zip(run.members, others, strict=False):
            assert member.parents == (before.name,)
            assert chain.children(before.name) == (member.name,) and before.name not in exposed
        plain = [(m.for_each, m.when, m.on_error, m.fan_out) for m in run.members]
        assert set(plain) == {(None, None, "fail", run.fan_out)}


@given(chains())
def test_runs_of_models_that_batch_alike_bind_as_declared(chain: Chain) -> None:
    possible = [run for run in runs_of(chain) if run_spec(run, MODELS) is not None]
    specs = {run.model: spec for run in possible if (spec := run_spec(run, MODELS)) is not None}
    for run in possible:
        limits = [MODELS[member.model].max_batch_size for member in run.members]
        assert specs[run.model].max_batch_size == min(limits)
        assert (min(limits) > 0) == (max(limits) > 0)
    declared = bind(chain, MODELS)
    served = bind(merge(chain, possible), {**MODELS, **specs})
    assert (served.inputs, served.outputs) == (declared.inputs, declared.outputs)


@given(chains(), chains())
def test_a_runs_model_is_named_for_its_wiring(one: Chain, other: Chain) -> None:
    named: dict[str, object] = {}
    for run in (*runs_of(one), *runs_of(other)):
        wiring = [(m.name, m.model, sorted(m.inputs.items(), key=str)) for m in run.members]
        assert named.setdefault(run.model, wiring) == wiring
