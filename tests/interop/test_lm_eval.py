"""The harness scores a run: likelihoods are the model's own, long texts are scored whole."""

import json
import types

import numpy as np
import pytest
from small import small_model, small_run

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.slow

import jax  # noqa: E402

from tinylm.interop import lm_eval as adapter  # noqa: E402

TEXT = "A fox, a fox, and one more fox."


@pytest.fixture(scope="module")
def model():
    """A random model of bytes with a context of 24."""
    run = small_run(small_model("llama"))
    run.start_id = 7
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapter, "open_run", lambda workdir, step: run)
        return adapter.TinyLM("nowhere", batch_size=3)


def requests(*arguments):
    return [types.SimpleNamespace(args=pair) for pair in arguments]


def log_probabilities(model, ids):
    """Return log p of each id but the first, and whether it is the most probable one.

    By one plain forward pass.
    """
    logits = np.asarray(model.run.model(np.asarray([ids[:-1]])))[0].astype(np.float64)
    logits -= np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    return logits[np.arange(len(ids) - 1), ids[1:]], logits.argmax(-1) == ids[1:]


def test_likelihoods_are_those_of_the_plain_model(model):
    pairs = [("A fox", ", a"), ("", "A fox"), ("A", " fox"), ("A fox and one", "!"), ("A ", "fox")]
    found = model.loglikelihood(requests(*pairs), disable_tqdm=True)
    for (context, continuation), (total, greedy) in zip(pairs, found, strict=True):
        ids = [model.prefix_token_id, *model.tokenizer.encode(context + continuation)]
        scores, hits = log_probabilities(model, ids)
        size = len(continuation)
        if context.endswith(" "):
            # The harness moves spaces to the continuation.
            size += 1
        assert total == pytest.approx(scores[-size:].sum(), rel=1e-5)
        assert greedy == hits[-size:].all()


def test_what_greedy_decoding_writes_is_greedy(model):
    prompt = [model.prefix_token_id, 65]
    [ids] = model.decoder.write(
        model.run.params, [prompt], max_tokens=3, sampler=adapter.Sampler(0.0)
    )
    [(_, greedy)] = model.score_pairs([(prompt, ids)])
    assert greedy
    assert not model.score_pairs([(prompt, [*ids[:-1], (ids[-1] + 1) % 256])])[0][1]


def test_every_byte_of_a_long_text_is_scored_once(model):
    short, long = TEXT[:20], TEXT * 4
    totals = model.loglikelihood_rolling(requests((short,), (long,), ("",)))
    assert totals[0] == pytest.approx(
        log_probabilities(model, model.tok_encode(short))[0].sum(), rel=1e-5
    )
    ids, expected, done = model.tok_encode(long), 0.0, 24
    expected += log_probabilities(model, ids[:25])[0].sum()
    # Of each window of the context only the new half is scored.
    while done < len(ids) - 1:
        new = min(13, len(ids) - 1 - done)
        expected += log_probabilities(model, ids[done + new - 24 : done + new + 1])[0][-new:].sum()
        done += new
    assert totals[1] == pytest.approx(expected, rel=1e-5)
    assert totals[2] == 0


def test_writing_stops_at_the_first_end(model):
    whole = model.generate_until(requests((TEXT * 3, {"max_gen_toks": 12})))[0]
    cut = model.generate_until(
        requests((TEXT * 3, {"max_gen_toks": 12, "until": ["zzz", whole[2:4]]}))
    )[0]
    assert whole.startswith(cut)
    assert cut == whole[: whole.find(whole[2:4])]


def test_a_task_of_local_files(model, tmp_path, monkeypatch):
    """The right answer of each question is the one that the model finds likelier.

    So the harness must find an accuracy of 1.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rows = []
    for question in ("A fox", "One dog", "My cat"):
        scores = model.loglikelihood(
            requests((question, " runs"), (question, " eats")), disable_tqdm=True
        )
        rows.append(
            {
                "q": question,
                "answers": ["runs", "eats"],
                "gold": int(np.argmax([total for total, _ in scores])),
            }
        )
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "local",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": str(tmp_path / "rows.jsonl")},
        "test_split": "train",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "answers",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "local.yaml").write_text(json.dumps(task))
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    result = simple_evaluate(model=model, tasks=["local"], task_manager=manager, bootstrap_iters=0)
    assert result["results"]["local"]["acc,none"] == 1.0
    assert jax.device_count() == 8
