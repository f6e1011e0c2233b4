"""The towers that networks are built from, and what they need of transformers."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import fresh
import pytest
import torch
from compression_cases import CONFIGS, build, tiny_xvlm
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedConfig

import efficientvlm
from efficientvlm.compression.gates import attach
from efficientvlm.compression.surgery import pad_model, slice_model
from efficientvlm.errors import BadInput
from efficientvlm.families.anatomy import HEAD, NEURON, Flow, Site
from efficientvlm.families.network import ABILITIES, Network, require
from efficientvlm.families.structure import Sizes, Structure
from efficientvlm.families.towers.attention import Attention, Cache, Context, causal
from efficientvlm.families.towers.layers import Layers, PostNormLayer, PreNormLayer, Size
from efficientvlm.families.towers.network import TowerNetwork
from efficientvlm.families.towers.parts import activation

PACKAGE = Path(efficientvlm.__file__).parent
KINDS = {"xvlm": "X-VLM", "siglip": "SigLIP", "clip": "CLIP", "blip": "BLIP"}
NAMED = {"attention": "attn", ":q": "self.query", ":out": "output.dense", "attention_norm": "attn.output.LayerNorm", "fc1": "up.dense"}


def layer(heads: int = 2, neurons: int = 5, cross: int | None = 2, **names: str) -> PostNormLayer:
    torch.manual_seed(0)
    size = Size(8, 4, heads, neurons, cross, 6)
    return PostNormLayer(size, 1e-5, F.gelu, names, dropout=0.0, attention_dropout=0.0).eval()


def test_networks_need_nothing_from_inside_the_models_of_transformers(tmp_path: Path) -> None:
    """Configurations, tokenizers and processors only: no class of a network, and no file that holds one."""
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [name.name for name in node.names] if isinstance(node, ast.Import) else []
            inside = [
                name for name in modules if name.startswith("transformers.models") or "modeling_" in name.removesuffix("modeling_outputs")
            ]
            assert not inside, f"{file} imports {inside}"
    program = (
        "import sys\nfrom efficientvlm import families\n"
        "for name in families.FAMILIES: families.get(name)\n"
        "inside = [name for name in sys.modules if name.startswith('transformers.models.') and '.modeling_' in name]\n"
        "print(*(name for name in inside if '.auto.' not in name))"
    )
    assert fresh.outputs({"families": (program, [])}, tmp_path)["families"].split() == []


def test_parts_lie_where_they_are_named_and_compute_the_same() -> None:
    plain, named = layer(), layer(**NAMED)
    renamed = {"attn.self.query.weight", "attn.k.weight", "attn.output.dense.weight", "attn.output.LayerNorm.weight", "ffn.fc2.bias"}
    assert renamed <= set(named.state_dict()) and "attention.q.weight" in plain.state_dict()
    named.load_state_dict(dict(zip(named.state_dict(), plain.state_dict().values(), strict=True)))
    x, context = torch.randn(3, 5, 8), Context([plain.cross_attention.project(torch.randn(3, 7, 6))])
    torch.testing.assert_close(named(x, None, context), plain(x, None, context), rtol=0, atol=0)
    site = named.sites("text.3", HEAD, 1)[0]
    assert site == ("text.3.attn.self.query.weight", 0, 4, 8) and named.attention.q is named.attn.self.query
    with pytest.raises(AttributeError, match="qkv"):
        _ = named.attention.qkv


def test_a_part_that_is_exchanged_is_used() -> None:
    named = layer(**NAMED)
    x = torch.randn(2, 3, 8)
    before = named(x)
    named.attn.self.query = torch.nn.Linear(8, 8)
    assert not torch.equal(named(x), before)


@pytest.mark.parametrize("fused", [False, True])
def test_tokens_one_by_one_attend_as_all_at_once(fused: bool) -> None:
    torch.manual_seed(0)
    attention, x = Attention(8, 8, 2, 4, fused=fused), torch.randn(2, 5, 8)
    maps: list[torch.Tensor] = []
    whole = attention.itself(x, causal(5, 0, x.device), maps)
    torch.testing.assert_close(attention.itself(x, causal(5, 0, x.device)), whole)
    cache = Cache()
    steps = []
    for at in range(5):
        steps.append(attention.itself(x[:, at : at + 1], causal(1, at, x.device), None, cache, 3))
        cache.length += 1
    torch.testing.assert_close(torch.cat(steps, 1), whole)
    assert cache.kv[3][0].shape == (2, 2, 5, 4) and not maps[0].triu(1).any()


def test_a_pass_in_two_runs_keeps_what_one_keeps() -> None:
    torch.manual_seed(0)
    layers = Layers(PreNormLayer(Size(8, 4, 2, 5), 1e-5, F.gelu, {}) for _ in range(3))
    x, keep = torch.randn(2, 5, 8), frozenset({"hidden", "self_attention.1"})
    whole = layers.run(x, keep)
    half = layers.run(x, keep, last=1)
    both = layers.run(half.states, keep, after=half, first=1)
    assert [len(maps) for maps in both.self_attention] == [0, 2, 0] and len(both.hidden) == 4
    for mine, other in zip([both.states, *both.hidden], [whole.states, *whole.hidden], strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0)


def test_an_activation_that_is_not_known_is_refused() -> None:
    for name in ("gelu", "quick_gelu", "gelu_pytorch_tanh", "relu", "silu"):
        from transformers.activations import ACT2FN

        x = torch.linspace(-4, 4, 33)
        torch.testing.assert_close(activation(name)(x), ACT2FN[name](x))
    for name in ("gelu_squared", 3, None):
        with pytest.raises(BadInput, match="unknown activation"):
            activation(name)


@pytest.mark.parametrize("name", ["xvlm", "clip", "siglip", "blip-qa"])
def test_a_copy_of_a_network_is_its_own(name: str) -> None:
    import copy

    model, batch = build(name)
    other: Any = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert any(parameter.any() for parameter in model.parameters())
    assert model.run(batch)["logits"].abs().max() > 0


class StagedConfig(Structure, PreTrainedConfig):
    """A tower whose second layer is wider, with more heads and neurons, as the stages of a Swin are."""

    model_type = "staged"
    columns: tuple[int, ...] = (8, 16)
    heads: tuple[int, ...] = (2, 4)
    neurons: tuple[int, ...] = (6, 10)

    def layers(self) -> dict[str, int]:
        return {"vision": 2}

    def original_counts(self) -> dict[str, int]:
        return {f"vision.{i}.{kind}": counts[i] for i in range(2) for kind, counts in ((HEAD, self.heads), (NEURON, self.neurons))}

    def sizes(self) -> Sizes:
        first, second = self.columns
        return Sizes(4, 1, 1, 1, {"vision": (first, first, second)}, {"vision": tuple(self.heads)}, (0.0,) * 3, (1.0,) * 3)

    def flows(self) -> list[Flow]:
        return []


class Widening(PreNormLayer):
    """A layer that widens what it reads first."""

    def __init__(self, size: Size, before: int) -> None:
        super().__init__(size, 1e-5, F.gelu, {})
        self.widen = torch.nn.Linear(before, size.width)

    def forward(self, x: Tensor, *rest: Any, **named: Any) -> Tensor:
        return super().forward(self.widen(x), *rest, **named)


class Staged(TowerNetwork):
    config_class = StagedConfig
    places = {"vision": "layers"}
    owners = {"layers": "vision"}

    def __init__(self, config: StagedConfig) -> None:
        super().__init__(config)
        kept = config.kept_indices()
        sizes = [Size.of(kept, f"vision.{i}", config.columns[i], config.heads[i]) for i in range(2)]
        self.layers = Layers([PreNormLayer(sizes[0], 1e-5, F.gelu, {}), Widening(sizes[1], config.columns[0])])
        self.post_init()

    def forward(self, x: Tensor, keep: frozenset[str] = frozenset()) -> Any:
        return self.layers.run(x, keep)


def test_widths_and_heads_may_differ_by_layer() -> None:
    torch.manual_seed(0)
    model, x = Staged(StagedConfig(initializer_range=0.3)).eval(), torch.randn(2, 5, 8)
    sizes = model.config.sizes()
    whole = model(x, frozenset({"hidden", "self_attention"}))
    assert tuple(states.shape[-1] for states in whole.hidden) == sizes.widths["vision"] == (8, 8, 16)
    assert tuple(maps.shape[1] for maps in whole.self_attention) == sizes.heads["vision"] == (2, 4)
    assert sizes.shapes("vision") == {"width": [8, 16], "heads": [2, 4]}
    cut_alike(model, x)


def cut_alike(model: Staged, x: Tensor) -> None:
    """With some units gone, masked, sliced and padded are one function."""
    units = model.units()
    keep = torch.tensor([unit.index % 2 == unit.layer for unit in units])
    with attach(model, units) as hooks, torch.no_grad():
        hooks.set(keep.float())
        masked = model(x).states
    sliced = slice_model(model, keep)
    assert [layer.size.heads for layer in sliced.layers] == [1, 2] and [layer.size.neurons for layer in sliced.layers] == [3, 5]
    torch.testing.assert_close(sliced(x).states, masked)
    torch.testing.assert_close(pad_model(sliced)(x).states, masked)


class Twice(PreNormLayer):
    """A layer whose heads work once more, with queries and an output of their own and the same keys and values, as NLVR2's do."""

    def __init__(self, size: Size) -> None:
        super().__init__(size, 1e-5, F.gelu, {})
        self.other = Attention(size.width, size.width, size.heads, size.head_width)
        for role in "kv":
            self.other._modules.pop(role, None)

    def forward(self, x: Tensor, *rest: Any, **named: Any) -> Tensor:
        x = x + self.other(x, self.attention.project(x))
        return super().forward(x, *rest, **named)

    def sites(self, prefix: str, kind: str, position: int) -> tuple[Site, ...]:
        more = self.other.sites(f"{prefix}.other", position) if kind == HEAD else ()
        return (*super().sites(prefix, kind, position), *(site for site in more if site.tensor.split(".")[-2] in ("q", "out")))


class Doubled(Staged):
    def __init__(self, config: StagedConfig) -> None:
        super().__init__(config)
        self.layers[0] = Twice(self.layers[0].size)


def test_a_head_of_a_tower_may_have_two_gate_points() -> None:
    torch.manual_seed(0)
    model, x = Doubled(StagedConfig(initializer_range=0.3)).eval(), torch.randn(2, 5, 8)
    gates = {unit.kind: [gate.module for gate in unit.gates] for unit in model.units() if unit.layer == 0}
    assert gates == {HEAD: ["layers.0.attention.out", "layers.0.other.out"], NEURON: ["layers.0.ffn.fc2"]}
    cut_alike(model, x)


def test_a_network_answers_no_more_than_it_must() -> None:
    members = {name for kind in Network.__mro__ for name in vars(kind) if not name.startswith("_")}
    assert len(members) <= 12, members


def test_who_is_able_is_said_as_it_is() -> None:
    """The table that a refusal names families from agrees with their configurations."""
    heads = tiny_xvlm().copy(decoder_layers=0, heads=["itc", "itm", "mlm", "box"])
    able: dict[str, set[str]] = {}
    for config in (*CONFIGS.values(), heads, CONFIGS["xvlm-two-images"].copy(heads=["assign"])):
        kind = next((name for part, name in KINDS.items() if part in config.model_type), None)
        for ability in config.abilities() if kind else ():
            able.setdefault(ability, set()).add(str(kind))
    assert {name: {kind for kind in KINDS.values() if kind in who} for name, (_, who) in ABILITIES.items()} == able
    for name in CONFIGS:
        if name == "toy":
            continue
        model, _ = build(name)
        for ability in set(ABILITIES) - model.config.abilities():
            with pytest.raises(BadInput, match=ABILITIES[ability][0]) as refused:
                require(model, ability)
            assert ABILITIES[ability][1] in refused.value.fix
