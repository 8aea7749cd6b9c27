"""What is counted, against what is known: parameters, published FLOPs per token, activation formulas, link times."""

import pytest

from tests.plan.small import job, machine, model
from trimaran.errors import Refusal
from trimaran.model.config import LETTERS, ModelConfig
from trimaran.model.presets import PRESETS, preset
from trimaran.model.size import count
from trimaran.plan.blocks import block, draft, head, model_flops
from trimaran.plan.costs import Costs, Job, Pass, table
from trimaran.plan.hardware import Hardware, find
from trimaran.plan.hardware import table as machines
from trimaran.plan.layout import Layout
from trimaran.plan.links import along, seconds, together
from trimaran.plan.memory import Room
from trimaran.plan.practice import Practice

COMPUTED = [name for name in PRESETS if isinstance(preset(name), ModelConfig)]


@pytest.mark.parametrize("name", COMPUTED)
def test_blocks_add_up_to_the_model(name):
    config = preset(name)
    blocks = [*(block(config, letter) for letter in config.pattern), head(config), table(config), *draft(config)]
    assert sum(part.weights for part in blocks) == count(config).total


@pytest.mark.parametrize(
    ("name", "sequence", "tflops", "tokens"),
    [  # Megatron-Bridge 25.11, GB300: model TFLOP/s and tokens/s per GPU, whose ratio is its count per token
        ("llama3-8b", 8192, 1933, 37556),
        ("llama3-70b", 8192, 2030, 4520),
        ("llama3-405b", 8192, 2522, 999),
        ("qwen3-30b-a3b", 4096, 666, 28934),
    ],
)
def test_model_flops_are_those_that_nvidia_counts(name, sequence, tflops, tokens):
    assert model_flops(preset(name), sequence) == pytest.approx(tflops / tokens * 1e12, rel=5e-3)


@pytest.mark.parametrize("letter", LETTERS)
def test_model_flops_are_three_forwards_of_the_size_module(letter):
    config = model(letter, sliding_window=1000)
    mean = 33 / 2  # keys that a token of a row of 32 sees
    forward = count(config)
    wanted = forward.flops_weights + forward.memory.flops_fixed
    wanted += (forward.memory.flops_per_key + forward.memory.flops_per_window_key) * mean
    ours = model_flops(config, 32) / 3
    assert ours == pytest.approx(wanted, rel=0.02)  # the size module counts the convolution and D x, too


def test_a_window_is_the_mean_over_a_row():
    part = block(model("W", sliding_window=4), "W")
    assert part.keys(10) == pytest.approx(sum(min(place, 4) for place in range(1, 11)) / 10)
    assert part.keys(3) == 2


def test_activations_are_those_of_the_published_formula():
    """34 s b h + 5 a s^2 b of arXiv 2205.05198, table 2, but for its dropout masks and inputs that we do not keep."""
    config = ModelConfig(
        pattern="*-", vocab_size=512, hidden_size=1024, intermediate_size=4096, num_attention_heads=16,
        num_key_value_heads=16, head_dim=64,
    )  # fmt: skip
    kept = []
    for fused in (True, False):
        costs = Costs(Job(config, 2048, 1, machine(), practice=Practice(fused_attention=fused)))
        kept.append(Room(costs).needed(Layout()).activations)
    tokens = 2048 * 1024
    assert 28 * tokens <= kept[0] <= 36 * tokens
    assert kept[1] - kept[0] == 5 * 16 * 2048**2


def test_weights_follow_the_optimizer_formula():
    """Bytes per parameter over the ranks that share it, as in Megatron's 6 + 12/d with a sharded optimizer."""
    sharded = Practice(shards_weights=False, weight=2, gradient=4, optimizer=12)
    asked = job("*-", rows=4, practice=sharded)
    parts = Room(Costs(asked)).needed(Layout(fsdp=4))
    total = count(asked.config).total
    assert parts.weights + parts.gradients == 6 * total
    assert parts.optimizer == pytest.approx(12 * total / 4, rel=1e-3)


def test_links_by_hand():
    hardware = machine(link=4e9, network=1e9, domain=4)
    link, network = 4e9 * hardware.reach.link, 1e9 * hardware.reach.network
    near, far = hardware.latency
    assert seconds(hardware, "all_reduce", 8e6, 4) == pytest.approx(2 * near + 1.5 * 8e6 / link)
    assert seconds(hardware, "all_gather", 8e6, 2) == pytest.approx(near + 4e6 / link)
    assert seconds(hardware, "all_gather", 8e6, 2, stride=4) == pytest.approx(far + 4e6 / network)
    assert seconds(hardware, "all_gather", 8e6, 8) == pytest.approx(3 * far + 7e6 / min(link, 4 * network))
    assert seconds(hardware, "all_to_all", 8e6, 8) == pytest.approx(3 * far + max(4e6 / network, 3e6 / link))
    assert seconds(hardware, "send", 8e6, 2, stride=4) == pytest.approx(far + 8e6 / network)
    assert seconds(hardware, "all_reduce", 8e6, 1) == 0


def test_measured_curves_replace_links():
    hardware = machine(curves={"all_reduce": [(1e3, 1e-4), (1e5, 2e-4), (1e6, 2e-3)]})
    assert seconds(hardware, "all_reduce", 1e5, 2) == pytest.approx(2e-4)
    assert seconds(hardware, "all_reduce", 10, 2) == 1e-4
    assert seconds(hardware, "all_reduce", 2e6, 2) == pytest.approx(2e-3 + 1e6 * 2e-9)
    assert along([(1e3, 5e-4)], 1e9) == 5e-4


def test_together_hides_the_shorter():
    assert together(10.0, 0.0, 1.2, 1.2) == 10
    assert together(0.0, 3.0, 1.2, 1.2) == 3
    assert together(10.0, 4.0, 1.0, 1.0) == 10
    assert together(4.0, 10.0, 1.0, 1.0) == 10
    assert together(10.0, 4.0, 1.25, 1.5) == pytest.approx(6 + 10 - 6 / 1.25)
    for talk in (0.1, 5.0, 9.0, 30.0):
        assert max(10.0, talk) <= together(10.0, talk, 1.2, 1.3) <= 10.0 + talk


def test_a_pipeline_takes_what_its_formula_says():
    """m max(t) + (sum(t) - max(t)) / v, without messages and tails."""
    still = machine(link=1e30, domain=64, latency=(0.0, 0.0))
    asked = job("*-*-*-*-", rows=8, hardware=still)
    costs = Costs(asked)
    for virtual in (1, 2):
        layout = Layout(pp=2, virtual=virtual)
        each = [costs.stage(stage, layout).total for stage in costs.stages(layout)]
        times = costs.step(layout)
        assert times.total - times.optimizer == pytest.approx(8 * max(each) + min(each) / virtual)


def test_stages_hold_every_layer_once():
    costs = Costs(job("ME*EME*E", mtp_pattern="*"))
    for pp in (1, 2, 3, 8):
        found = costs.stages(Layout(pp=pp))
        letters = "".join(letter * number for stage in found for letter, number in stage.layers)
        assert len(found) == pp and sorted(letters) == sorted("ME*EME*E")
        assert [stage.first for stage in found].count(True) == 1 and found[-1].last


def test_expert_messages_are_four_exchanges():
    asked = job("E", rows=4)
    part, layout = block(asked.config, "E"), Layout(fsdp=4, ep=4)
    size = 64 * 2 * 64 * 2  # tokens x chosen x width x bytes
    one = Costs(asked).passed(part, layout)
    assert isinstance(one, Pass)
    assert sum(one.expert) == pytest.approx(4 * seconds(asked.hardware, "all_to_all", size, 4))


def test_context_pieces_see_uneven_triangles():
    """Contiguous pieces: the last of n sees 2 - 1/n times the mean."""
    even, ours = (Costs(job("*", practice=Practice(balanced_context=way))) for way in (True, False))
    part = block(even.job.config, "*")
    works = [costs.job.setting.work(part, Layout(cp=4))[0].attention for costs in (ours, even)]
    assert works[0] / works[1] == pytest.approx(2 - 1 / 4)


def test_every_machine_is_whole():
    for name, hardware in machines().items():
        assert isinstance(hardware, Hardware) and hardware.source
        assert find(name) == hardware
        assert 0 < hardware.usable < hardware.memory
        assert hardware.flops("nvfp4") >= hardware.flops("bf16") >= hardware.flops("fp32")
    assert find("H100-SXM") == find("h100")


def test_unknown_hardware_names_the_nearest():
    with pytest.raises(Refusal, match=r"unknown hardware 'h1000'.*did you mean --hardware h100"):
        find("h1000")


@pytest.mark.parametrize(
    ("text", "said"),
    [("{", "is no JSON"), ("[]", "holds no table"), ('{"name": "x"}', "is missing"), (None, "no file")],
)
def test_a_file_of_figures_must_be_one(tmp_path, text, said):
    path = tmp_path / "mine.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(Refusal, match=said):
        find(str(path))
    good = machine().replace(name="mine")
    path.write_text(good.model_dump_json())
    assert find(str(path)) == good
