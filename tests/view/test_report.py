"""Reports: what is gathered from a run's files, attention as the model computes it, and the page in
a real browser.
"""

import dataclasses
import json
import math
import re
import shutil

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest
from flax import nnx
from helpers import call_command, png_of, tiny_model
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cbook import is_math_text

from tinylm import report as command
from tinylm.config import load_config
from tinylm.core.errors import UserError
from tinylm.core.mesh import MeshConfig, make_mesh
from tinylm.core.placement import place_parameters
from tinylm.core.settings import to_dict
from tinylm.data.tokenizers import ByteTokenizer
from tinylm.model.transformer import Transformer, abstract_transformer
from tinylm.model.visibility import Visibility
from tinylm.run.folder import RunFolder
from tinylm.run.open_run import Run
from tinylm.view import page, report
from tinylm.view.attention import Attention, attention_of, attention_weights
from tinylm.view.history import MOST_POINTS, History, curves, gather
from tinylm.view.parameters import describe_run
from tinylm.view.plot import COLORS, PANELS, figure_of_curves, save

EVIL = "</script><script>document.title='run'</script>"


def made_run(workdir, learning_rate=1e-3):
    """Write the folder of a run of 40 steps, killed at 30 and gone on with from 20."""
    config = load_config("tales", [f"optimizer.learning_rate={learning_rate}"])
    config.train.hang_secs = math.inf  # as older runs could have
    config = config.resolve(1024)
    folder = RunFolder(str(workdir))
    folder.create()
    folder.write_config(
        {"config": to_dict(config), "versions": {"jax": "1", "mesh": {"data": 4, "model": 2}}}
    )
    for first, last, process in ((0, 30, 1.0), (20, 40, 2.0)):
        for step in range(first + 1, last + 1):
            folder.log(
                {
                    "step": step,
                    "split": "train",
                    "loss": 4 / step + process,
                    "grad_norm": 1.0,
                    "mfu": None,
                    "learning_rate": learning_rate,
                    "tokens_per_sec": 100.0,
                    "update_ratio/mlp": 1e-3 / step,
                    "unix_secs": 1e9 + 10 * step,
                }
            )
            if step % 10 == 0:
                folder.log(
                    {
                        "step": step,
                        "split": "valid",
                        "loss": 5 / step,
                        "floor": 0.1,
                        "unix_secs": 1e9,
                    }
                )
                secs = {"total_secs": step, "train_secs": step / 2, "eval_secs": step / 2}
                folder.log({"step": step, "split": "time", "process": process, **secs})
        texts = [f"--- step 20 ---\nprocess {process} {i} {EVIL}\n" for i in range(3)]
        folder.append(folder.samples_file, "".join(texts))
    folder.append(folder.metrics_file, '{"step": 41, "split": "tr')
    return str(workdir)


def history(**changes):
    """Return the history of a run that did nothing."""
    nothing = {field.name: None for field in dataclasses.fields(History)}
    nothing |= {"train": {}, "valid": {}}
    return History(**{**nothing, **changes})


def test_the_last_line_of_a_step_counts_and_a_torn_one_does_not(tmp_path):
    run = gather(made_run(tmp_path / "run"))
    assert run.train["step"] == list(range(1, 41))
    assert run.train["loss"][19] == pytest.approx(4 / 20 + 1)
    assert run.train["loss"][20] == pytest.approx(4 / 21 + 2, rel=1e-5)
    assert (run.train["secs"][0], run.train["secs"][39]) == (10, 400)
    assert run.valid["step"] == [10, 20, 30, 40]
    assert run.floor == 0.1
    assert [text[:11] for text in run.samples[0].texts] == ["process 2.0"] * 3
    assert run.time == {
        "train": 10 + 20,
        "eval": 10 + 20,
    }  # the first process's account of step 30 was replaced


def test_a_long_run_is_thinned_and_keeps_its_ends():
    lines = [{"step": step, "split": "train", "loss": 1.0} for step in range(1, 100_001)]
    thinned = curves(lines, "train", 0.0)
    assert len(thinned["step"]) <= MOST_POINTS
    assert (thinned["step"][0], thinned["step"][-1]) == (1, 100_000)


def test_steps_of_a_very_long_run_keep_all_their_digits():
    lines = [{"step": step, "split": "train", "loss": 1 / 3} for step in (1_234_567, 1_234_568)]
    found = curves(lines, "train", 0.0)
    assert (found["step"], found["loss"]) == ([1_234_567, 1_234_568], [0.333333] * 2)


@pytest.mark.parametrize(
    "options",
    [
        {"num_kv_heads": 2, "attention_window": (0, 3), "qk_norm": True},
        {"attention_softcap": 1.0, "position": "learned", "qkv_bias": True, "bias": True},
        {
            "attention_window": (3,),
            "local_heads": 2,
            "parallel_residual": True,
            "rotary_fraction": 0.5,
        },
    ],
)
def test_attention_weights_are_those_of_the_model(options):
    """They are causal, and times the values they make what the production block makes, layer after
    layer.
    """
    model = Transformer(tiny_model(init_std=0.3, **options), rngs=nnx.Rngs(params=0))
    tokens, c = jnp.arange(12)[None] * 5, model.config
    weights = np.asarray(jax.jit(lambda ids: attention_weights(model, ids))(tokens))
    assert weights.shape == (2, 4, 12, 12)
    assert np.all(np.triu(weights, 1) == 0)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    positions = jnp.arange(12)[None]

    @jax.jit
    def attended(weights):
        """Return what each layer's attention makes, by these weights and by the block's own."""
        x, pairs = model.embed(tokens, positions), []
        for layer, block in enumerate(model.unstacked_blocks()):
            window = c.attention_window[layer % len(c.attention_window)]
            inputs = model.layer_inputs(positions, Visibility(window=window))
            v_BNTH = jnp.repeat(
                block.attention.value(block.attention_norm(x)).swapaxes(1, 2),
                4 // c.num_kv_heads,
                1,
            )
            ours = block.attention.out(jnp.einsum("NTS,BNSH->BTNH", weights[layer], v_BNTH))
            pairs.append((ours, block.attention(block.attention_norm(x), inputs)[0]))
            x = block(x, inputs)[0]
        return pairs

    for ours, theirs in attended(weights):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def run_on(mesh_config):
    """Return a run of random parameters that are split over a mesh."""
    config = tiny_model(vocab_size=ByteTokenizer.vocab_size, num_kv_heads=2)
    mesh = make_mesh(mesh_config)
    graph, shapes, axes = abstract_transformer(config)
    rng = np.random.default_rng(0)

    def draw(place):
        values = rng.normal(0, 0.3, place.shape).astype(np.float32)
        return jax.device_put(values, place.sharding)

    places = place_parameters(shapes, axes, mesh, fsdp=True)
    return Run(
        folder=None,
        config={},
        step=0,
        mesh=mesh,
        model_config=config,
        graph=graph,
        params=jax.tree.map(draw, places),
        tokenizer=ByteTokenizer(),
        start_id=ByteTokenizer.eot_id,
    )


def test_attention_is_the_same_on_any_mesh_whatever_the_mesh_of_the_caller():
    alone = attention_of(run_on(MeshConfig(data=1, model=1)), "a cat sat")
    run = run_on(MeshConfig(data=2, model=2))
    assert all(len(leaf.sharding.device_set) == 4 for leaf in jax.tree.leaves(run.params))
    assert not any(
        leaf.is_fully_replicated for leaf in jax.tree.leaves(run.params["blocks"]["mlp"])
    )
    with jax.set_mesh(make_mesh(MeshConfig(data=4, model=2))):
        split = attention_of(run, "a cat sat")
    assert split.tokens == alone.tokens == ["⏎", *"a cat sat"]
    np.testing.assert_allclose(split.weights_LNTS, alone.weights_LNTS, rtol=1e-4, atol=1e-6)


def test_a_report_has_the_picture_of_the_heads_that_were_asked_for(tmp_path, monkeypatch):
    run = run_on(MeshConfig(data=1))
    monkeypatch.setattr(report, "open_run", lambda *_: run)
    request = report.AttentionRequest("a cat", ["1.3", "0.0"], "best")
    *_, picture = report.write_report([made_run(tmp_path / "run")], "", request)
    assert picture.name == "report_attention_run.png"
    attention = attention_of(run, "a cat")
    figure = page.figure_of_attention(attention, [(1, 3), (0, 0)])
    assert picture.read_bytes() == png_of(figure)


def test_folders_may_follow_the_flag_and_names_tell_runs_apart():
    assert command.spread(["--workdir", "a", "b", "--out=x"]) == [
        "--workdir=a",
        "--workdir=b",
        "--out=x",
    ]
    assert command.spread(["--workdir=a", "b", "--step", "best"]) == [
        "--workdir=a",
        "--workdir=b",
        "--step",
        "best",
    ]
    assert command.spread(["--out", "workdir", "--workdir", "a"]) == [
        "--out",
        "workdir",
        "--workdir=a",
    ]
    runs = [history(name="x", path=f"/r/{number}/x") for number in (1, 2)]
    assert [run.name for run in report.distinctly_named(runs)] == ["/r/1/x", "/r/2/x"]
    assert report.distinctly_named(runs[:1]) == runs[:1]
    with pytest.raises(UserError, match=r"2\.7 must be LAYER\.HEAD, up to 1\.3"):
        report.chosen_heads(["0.1", "2.7"], 2, 4)


def test_the_folder_of_a_sweep_stands_for_its_runs(tmp_path):
    runs = [made_run(tmp_path / "sweep" / f"seed={seed}") for seed in (1, 0)]
    (tmp_path / "sweep" / "other").mkdir()
    assert report.runs_in(str(tmp_path / "sweep")) == runs[::-1]
    assert report.runs_in(runs[0]) == [runs[0]]
    assert report.runs_in(str(tmp_path / "none")) == [str(tmp_path / "none")]


def test_one_of_several_runs_may_have_no_attention(tmp_path):
    """As these, which saved nothing; a single one is a mistake."""
    for name in ("a", "b"):
        made_run(tmp_path / "sweep" / name)
    done = call_command("tinylm.report", f"--workdir={tmp_path}/sweep", "--attention_text=A fox")
    assert done.returncode == 0, done.stderr
    warnings = done.stderr.splitlines()
    assert [line[:28] for line in warnings] == [
        f"warning: no attention of {name}: " for name in "ab"
    ]
    assert done.stdout.split() == [
        str(tmp_path / "sweep" / f"report.{kind}") for kind in ("html", "png")
    ]
    runs = [gather(str(tmp_path / "sweep" / name)) for name in "ab"]
    assert (tmp_path / "sweep" / "report.png").read_bytes() == png_of(figure_of_curves(runs))
    done = call_command("tinylm.report", f"--workdir={tmp_path}/sweep/a", "--attention_text=A fox")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


@pytest.mark.parametrize(
    ("part", "key", "value", "wanted"),
    [
        ("versions", "mesh", {"data": "x"}, "mesh.data='x' must be a whole number"),
        ("versions", "mesh", {"data": 0}, "mesh.data=0 must be at least 1"),
        ("config", "model", {"num_layers": 0}, "model.num_layers=0 must be at least 1"),
    ],
)
def test_a_model_or_mesh_that_is_none_is_one_line(tmp_path, part, key, value, wanted):
    folder = RunFolder(made_run(tmp_path / "run"))
    record = folder.read_config()
    record[part][key].update(value)
    folder.write_config(record)
    with pytest.raises(UserError, match=wanted):
        describe_run(str(folder.path))


def two_runs(tmp_path):
    runs = [gather(made_run(tmp_path / name, rate)) for name, rate in (("a", 1e-3), ("b", 1e-2))]
    weights = np.tril(np.full((2, 2, 3, 3), 0.25))
    maps = page.attention_maps(Attention(["x", "\n", "<z>"], weights), [(0, 0), (1, 1)])
    return [page.RunOnPage(run, describe_run(run.path), maps) for run in runs]


def test_the_page_holds_everything_itself(tmp_path):
    text = page.page("a <b>", two_runs(tmp_path))
    assert not re.search(r"https?://|src=|@import|<link", text)
    assert text.count("</script>") == 2
    assert "<title>a &lt;b&gt;</title>" in text
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])
    assert data["runs"][0]["samples"][0]["texts"][0].endswith(EVIL)
    assert data["runs"][0]["settings"]["train.hang_secs"] == "inf"
    axes = {row["parameter"]: row["split_by"] for row in data["runs"][0]["model"]["parameters"]}
    assert axes["embedding"] == ["model", ""]


def logged(workdir, split, name):
    """Return [(step, value)] as metrics.jsonl has them; of a step logged twice, the last."""
    text = (workdir / "metrics.jsonl").read_text()
    found = {}
    for line in text.splitlines()[:-1]:  # the last one is torn
        record = json.loads(line)
        if record["split"] == split and name in record:
            found[record["step"]] = record[name]
    return sorted(found.items())


def test_each_panel_has_the_lines_of_all_runs_as_they_were_logged(tmp_path):
    figure = figure_of_curves([run.history for run in two_runs(tmp_path)])
    names = ("loss", "grad_norm", "learning_rate", "tokens_per_sec")  # mfu is null in each line
    assert [axes.get_title() for axes in figure.axes] == [PANELS[name] for name in names]
    for axes, name in zip(figure.axes, names, strict=True):
        assert (axes.get_xlabel(), axes.get_xscale(), axes.get_yscale()) == (
            "step",
            "linear",
            "linear",
        )
        lines = iter(axes.get_lines())
        for run, color in zip("ab", COLORS, strict=False):
            for split in ("train", "valid") if name == "loss" else ("train",):
                line = next(lines)
                points = logged(tmp_path / run, split, name)
                np.testing.assert_allclose(line.get_xydata(), points, rtol=1e-5)
                assert line.get_label() == f"{run}, {split} (last {points[-1][1]:.3f})"
                assert line.get_color() == color
        if name == "loss":
            floor = next(lines)
            assert list(floor.get_ydata()) == [0.1, 0.1]
            assert floor.get_label() == "floor of the corpus (0.100)"
        assert not list(lines)


def test_what_a_run_begins_with_does_not_flatten_its_curves(tmp_path):
    loss, _, _, speed = figure_of_curves([run.history for run in two_runs(tmp_path)]).axes
    losses = dict(logged(tmp_path / "a", "train", "loss"))
    # The first twentieth are two steps.
    assert losses[3] < loss.get_ylim()[1] < losses[2]
    assert speed.get_ylim()[0] < 100 < speed.get_ylim()[1]


@pytest.mark.parametrize(
    ("count", "name"),
    [
        (1, "a"),
        (1, r"_a$\b$ " + 200 * "long"),
        (12, "optimizer.learning_rate=1e-2,model.num_layers="),
    ],
)
def test_the_legend_names_every_line_and_covers_none(tmp_path, count, name):
    """Names are text, though matplotlib takes some for formulas, and leaves out others."""
    run = gather(made_run(tmp_path / "run"))
    runs = [dataclasses.replace(run, name=f"{name}{i}") for i in range(count)]
    figure = figure_of_curves(runs, ["loss"])
    (axes,) = figure.axes
    (legend,) = figure.legends
    labels = [text.get_text().replace("\n", "").replace(" ", "") for text in legend.get_texts()]
    assert labels == [line.get_label().replace(" ", "") for line in axes.get_lines()]
    assert len(labels) == 2 * count + 1
    assert not any(map(is_math_text, labels))

    FigureCanvasAgg(figure).draw()
    whole = legend.get_window_extent()
    assert not whole.overlaps(axes.get_tightbbox())
    assert figure.bbox.contains(*whole.min) and figure.bbox.contains(*whole.max)
    assert axes.get_window_extent().height > 0.6 * 4 * figure.dpi, "no room for the curves"


def test_a_single_point_can_be_seen():
    run = history(name="a", train={"step": [7], "loss": [3.0]})
    (axes,) = figure_of_curves([run], ["loss"]).axes
    (line,) = axes.get_lines()
    assert line.get_marker() == "o"
    assert axes.get_ylim()[0] < 3 < axes.get_ylim()[1]


@pytest.mark.parametrize("usetex", [False, True])
def test_what_is_saved_is_the_figure(tmp_path, monkeypatch, usetex):
    """Also where the user's settings ask for LaTeX, which isn't there."""
    monkeypatch.setenv("PATH", str(tmp_path))
    run = gather(made_run(tmp_path / "run"))
    with matplotlib.rc_context({"text.usetex": usetex}):
        figure = figure_of_curves([run], ["loss"])
        save(figure, tmp_path / "curves.png")
    saved = matplotlib.image.imread(tmp_path / "curves.png")
    figure.dpi = saved.shape[1] / figure.get_figwidth()
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    np.testing.assert_array_equal(np.round(saved * 255), canvas.buffer_rgba())


def test_each_head_is_drawn_with_its_weights_and_tokens():
    weights_LNTS = np.tril(np.random.default_rng(0).random((2, 2, 4, 4)))
    attention = Attention(["⏎", "$y$", " ", "a\n"], weights_LNTS)
    heads = [(0, 1), (1, 0), (1, 1)]
    figure = page.figure_of_attention(attention, heads)
    assert "query" in figure.get_supylabel() and "key" in figure.get_supxlabel()
    for axes, (layer, head) in zip(figure.axes, heads, strict=True):
        assert axes.get_title() == f"layer {layer}, head {head}"
        (image,) = axes.images
        np.testing.assert_array_equal(image.get_array(), weights_LNTS[layer, head])
        assert (image.origin, *image.get_clim()) == ("upper", 0, 1)
        assert sum(image.to_rgba(1.0)) < sum(image.to_rgba(0.0)), "more weight is darker"
        for axis in axes.xaxis, axes.yaxis:
            assert list(axis.get_ticklocs()) == [0, 1, 2, 3]
            labels = [label.get_text() for label in axis.get_ticklabels()]
            assert labels == ["⏎", r"\$y\$", "␣", "a⏎"]


@pytest.fixture
def browser():
    """Give a real browser without a window."""
    playwright = pytest.importorskip("playwright.sync_api")
    program = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if program is None:
        pytest.skip("no Chromium here")
    with playwright.sync_playwright() as session:
        opened = session.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield opened
        opened.close()


def test_every_control_of_the_page_works_in_a_browser(tmp_path, browser):
    (tmp_path / "r.html").write_text(page.page("report", two_runs(tmp_path)))
    view, errors, asked = browser.new_page(), [], []
    view.on("pageerror", lambda error: errors.append(str(error)))
    view.on("request", lambda request: asked.append(request.url))
    view.goto(f"file://{tmp_path / 'r.html'}")
    assert view.title() == "report"  # no text of a run was run
    assert view.locator("figure").count() == 5

    def charts():
        return view.inner_html("#charts")

    seen = [charts()]
    view.select_option("#axis", "tokens")
    seen.append(charts())
    assert "tokens</text>" in seen[-1]
    view.select_option("#axis", "secs")
    seen.append(charts())
    assert "minutes since" in seen[-1]
    for control in ("#log", "#whole"):
        view.check(control)
        seen.append(charts())
    assert len(set(seen)) == len(seen)
    assert "NaN" not in "".join(seen)
    view.locator("figure svg").first.hover()
    assert "a train, step" in view.inner_text("#tip")
    assert "train 50%" in view.inner_text("#time")
    assert "process 2.0 0" in view.inner_text("#samples")
    view.select_option("#prompt", "2")
    assert "process 2.0 2" in view.inner_text("#samples")
    view.select_option("#head", "1")
    assert view.locator("#attention rect").count() == 6
    view.locator("#attention rect").first.hover()
    assert "x looks at x: 0.25" in view.inner_text("#tip")
    assert view.locator("#settings tr").count() == 2
    view.uncheck("#only")
    assert view.locator("#settings tr").count() > 50
    assert view.locator("#settings tr.differs").count() == 1
    assert "vocab by model" in view.inner_text("#model")
    view.click("[data-run='1']")
    assert view.locator("#model table").count() == 1
    view.click("[data-run='1']")
    assert view.locator("#model table").count() == 2
    assert errors == []
    assert asked == [f"file://{tmp_path / 'r.html'}"]


def scale_of(marks, logarithmic):
    """Return a function from pixels to numbers, by the marks (pixel, text) of an axis."""
    places, texts = zip(*marks, strict=True)
    numbers = np.array(texts, float)
    if logarithmic:
        numbers = np.log(numbers)
    slope, start = np.polyfit(places, numbers, 1)
    return lambda pixels: np.exp(slope * pixels + start) if logarithmic else slope * pixels + start


@pytest.mark.parametrize("logarithmic", [False, True])
def test_the_lines_of_the_page_are_at_the_numbers_that_were_logged(tmp_path, browser, logarithmic):
    """As read off the axes of the first panel."""
    (tmp_path / "r.html").write_text(page.page("report", two_runs(tmp_path)))
    view = browser.new_page()
    view.goto(f"file://{tmp_path / 'r.html'}")
    view.set_checked("#log", logarithmic)
    panel = view.locator("figure").first
    assert panel.locator("figcaption").inner_text() == PANELS["loss"]
    texts, paths, floors = panel.evaluate(
        """figure => {
            const attributes = (element, ...names) => names.map(name => element.getAttribute(name))
            const all = pattern => [...figure.querySelectorAll(pattern)]
            return [
                all("text").map(t => [...attributes(t, "text-anchor", "x", "y"), t.textContent]),
                all("path").map(p => attributes(p, "stroke", "d")),
                all("g line").map(l => +l.getAttribute("y1")),
            ]
        }"""
    )
    # Numbers of the upright axis end at it, 4 below their marks; those of the other are centred.
    up = [(float(y) - 4, text) for anchor, _, y, text in texts if anchor == "end"]
    along = [(float(x), text) for anchor, x, _, text in texts if anchor == "middle"]
    assert along.pop()[1] == "step"
    to_loss = scale_of(up, logarithmic)
    to_step = scale_of(along, False)
    wanted = []
    for run, color in zip("ab", COLORS, strict=False):
        for split in "train", "valid":
            wanted.append((color, logged(tmp_path / run, split, "loss")))
    assert [color for color, _ in paths] == [color for color, _ in wanted]
    for (_, drawn), (_, points) in zip(paths, wanted, strict=True):
        pixels = np.array(re.findall(r"[ML]([\d.-]+) ([\d.-]+)", drawn), float)
        steps, losses = np.array(points).T
        np.testing.assert_allclose(to_step(pixels[:, 0]), steps, atol=0.02)
        np.testing.assert_allclose(to_loss(pixels[:, 1]), losses, rtol=0.01, atol=0.01)
    (floor,) = floors
    assert to_loss(floor) == pytest.approx(0.1, rel=0.01)


def test_many_long_runs_are_drawn_and_each_prompt_has_its_name(tmp_path, browser):
    one, other = two_runs(tmp_path)
    steps = list(range(MOST_POINTS))
    train = {"step": steps, "secs": steps, "loss": steps}
    many = dataclasses.replace(one.history, prompts=["first"], train=train)
    single = dataclasses.replace(other.history, prompts=["other", "second"])
    runs = [dataclasses.replace(one, history=many)] * 100
    runs.append(dataclasses.replace(other, history=single))
    (tmp_path / "r.html").write_text(page.page("report", runs))
    view, errors = browser.new_page(), []
    view.on("pageerror", lambda error: errors.append(str(error)))
    view.goto(f"file://{tmp_path / 'r.html'}")
    assert view.locator("figure path").count() >= 100
    assert view.locator("#prompt option").all_inner_texts() == ["1: first", "2: second"]
    assert errors == []
