"""What experts take: counts by loops over choices made by hand, and tokens written so that a reader sees them."""

import json
import math

import jax
import numpy as np
import pytest
import tiny

from moejax import partition
from moejax.analysis import generation, run, specialisation, token_names
from moejax.data import pipeline, pretrained, tokenizers
from moejax.layers import moe
from moejax.training import evaluate

NUM_LAYERS, NUM_EXPERTS, NONE = 2, 3, 3
LABELS = ("arts", "<b>maths", "empty")


def make_batches(num_batches: int, labelled: bool = True) -> list[tuple[dict, moe.MoeAux]]:
    """Batches of 2 rows of 60 with padding, tokens without an expert, and layer 0 fond of certain letters."""
    rng = np.random.default_rng(0)
    batches = []
    for _ in range(num_batches):
        inputs_BL = rng.choice(list(b"aaaabbc, "), size=(2, 60)).astype(np.int32)
        preferred_BL = rng.integers(0, NUM_EXPERTS + 1, size=(NUM_LAYERS, 2, 60))
        preferred_BL[0][inputs_BL == ord(",")] = 1
        segment_ids_BL = np.ones((2, 60), np.int32)
        segment_ids_BL[1, 50:] = 0
        preferred_BL[:, segment_ids_BL == 0] = NONE
        batch = {"inputs_BL": inputs_BL, "segment_ids_BL": segment_ids_BL}
        if labelled:
            batch["labels_BL"] = np.where(segment_ids_BL > 0, rng.integers(-1, 2, size=(2, 60)), -1)
        aux = moe.MoeAux(
            losses={},
            count_E=rng.integers(0, 50, size=(NUM_LAYERS, NUM_EXPERTS)),
            dropped=np.zeros(NUM_LAYERS, int),
            entropy=np.zeros(NUM_LAYERS),
            together_EE=rng.integers(0, 50, size=(NUM_LAYERS, NUM_EXPERTS, NUM_EXPERTS)),
            preferred_BL=preferred_BL,
        )
        batches.append((batch, aux))
    return batches


def summarise(batches, labels=LABELS) -> dict:
    choices = specialisation.Choices()
    for batch, aux in batches:
        choices.add(batch, aux)
    return choices.summary(tokenizers.Bytes(), labels)


def flat(batches, layer: int) -> list[tuple[int, int, int]]:
    """(token, preferred expert, label) of every token that is not padding."""
    found = []
    for batch, aux in batches:
        for b in range(2):
            for l in range(60):
                if batch["segment_ids_BL"][b, l]:
                    label = int(batch["labels_BL"][b, l]) if "labels_BL" in batch else -1
                    found.append((int(batch["inputs_BL"][b, l]), int(aux.preferred_BL[layer, b, l]), label))
    return found


# --- numbers ---------------------------------------------------------------------------------------------------------


def test_the_summary_equals_a_loop_over_the_tokens():
    batches = make_batches(3)
    summary = summarise(batches)
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert summary["labels"] == list(LABELS)
    for layer, result in enumerate(summary["layers"]):
        tokens = flat(batches, layer)
        count_E = sum(aux.count_E[layer] for _, aux in batches)
        assert result["load"] == pytest.approx((count_E / count_E.sum()).tolist(), abs=1e-6)
        assert result["coactivation"] == sum(aux.together_EE[layer] for _, aux in batches).tolist()
        for expert in range(NUM_EXPERTS):
            mine = [token for token, preferred, _ in tokens if preferred == expert]
            assert result["preferred"][expert] == pytest.approx(len(mine) / len(tokens), abs=1e-6)
            scores = {}
            for token in set(mine):
                share, overall = mine.count(token) / len(mine), [t for t, _, _ in tokens].count(token) / len(tokens)
                if mine.count(token) >= 5 and share > overall:
                    row = {"token": "␣" if token == 32 else chr(token), "count": mine.count(token)}
                    row |= {"share": pytest.approx(share, abs=1e-5), "lift": pytest.approx(share / overall, abs=1e-3)}
                    scores[share * math.log(share / overall)] = row
            assert result["tokens"][expert] == [scores[score] for score in sorted(scores, reverse=True)]
            for label in range(2):
                of_label = [preferred for _, preferred, its in tokens if its == label]
                expected = pytest.approx(of_label.count(expert) / len(of_label), abs=1e-6)
                assert result["labels"][expert][label] == expected
                assert summary["label_tokens"][label] == len(of_label)
            assert result["labels"][expert][2] is None  # no token has it
    assert summary["layers"][0]["tokens"][1][0]["token"] == ","


def test_a_split_without_labels_and_with_one_choice_a_token():
    batches = [(batch, aux._replace(together_EE=None)) for batch, aux in make_batches(2, labelled=False)]
    summary = summarise(batches, labels=())
    assert (summary["labels"], summary["label_tokens"]) == ([], [])
    assert [layer["coactivation"] for layer in summary["layers"]] == [None, None]
    assert [layer["labels"] for layer in summary["layers"]] == [[[], [], []]] * 2


def test_an_expert_that_takes_all_or_nothing_has_no_characteristic_token():
    tokens_T = np.repeat([1, 2, 3], [50, 20, 10])
    assert specialisation.characteristic(tokens_T, np.ones(80, bool)) == []
    assert specialisation.characteristic(tokens_T, np.zeros(80, bool)) == []


def test_tokens_are_ranked_by_share_and_lift_worked_by_hand():
    # of all 1000: token 1 half, 2 a quarter, 3 a quarter less 4, 4 four times; the expert takes 100
    tokens_T = np.repeat([1, 2, 3, 4], [500, 250, 246, 4])
    mine_T = np.zeros(1000, bool)
    mine_T[:10] = mine_T[500:540] = mine_T[750:796] = mine_T[996:] = True  # 10, 40, 46 and 4 times
    found = specialisation.characteristic(tokens_T, mine_T)
    # 3: 0.46 ln(0.46 / 0.246) = 0.29; 2: 0.4 ln(0.4 / 0.25) = 0.19; 1 has a lift below 1, 4 is too rare
    assert found == [(3, 46, pytest.approx(0.46), pytest.approx(0.46 / 0.246)), (2, 40, 0.4, pytest.approx(1.6))]
    rare = specialisation.characteristic(tokens_T, mine_T, min_count=1)
    assert [row[0] for row in rare] == [3, 2, 4]  # 0.04 ln(10) = 0.09
    assert specialisation.characteristic(tokens_T, mine_T, num_tokens=1, min_count=1) == rare[:1]


# --- names -----------------------------------------------------------------------------------------------------------


def test_white_space_bytes_and_special_tokens_are_visible():
    ids = [ord("a"), 32, 10, 9, 0xE2, 0x80, 0, 256, ord("<")]
    shown = ["a", "␣", "⏎", "⇥", "<0xE2>", "<0x80>", "<U+0000>", "<end of text>", "<"]
    assert token_names.names(tokenizers.Bytes(), ids) == shown


def test_a_part_of_a_character_shows_the_bytes_that_the_vocabulary_has_for_it():
    bpe = tokenizers.Bpe.train(["the — cat — the — é é é", "a – b – c"] * 5, 300)
    names = token_names.names(bpe, range(bpe.vocab_size))
    assert "␣the" in names
    assert {f"<0x{byte:02X}>" for byte in (*range(0x80, 0xC0), *range(0xC3, 0xF4))} <= set(names)
    for word in (" —", " –", " é", "\n"):
        ids = bpe.encode(word)
        content = b"".join(_content(name) for name in token_names.names(bpe, ids))
        assert content.decode() == word


def _content(name: str) -> bytes:
    """The inverse of a name."""
    name = name.replace("␣", " ").replace("⏎", "\n")
    escaped = "".join(f"\\x{part[:2]}{part[3:]}" if i else part for i, part in enumerate(name.split("<0x")))
    return escaped.encode().decode("unicode_escape").encode("latin1") if "\\x" in escaped else name.encode()


def test_sentencepiece_tokens_show_the_space_before_them(tmp_path):
    import sentencepiece

    text = tmp_path / "text"
    text.write_text("the river the stone the wind runs over the stone under the river\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "m"), vocab_size=40, hard_vocab_limit=False, minloglevel=2
    )
    tokenizer = pretrained.SentencePiece.read(tmp_path / "m.model")
    assert "".join(token_names.names(tokenizer, tokenizer.encode("the river"))) == "␣the␣river"


# --- a run -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """A run that has not trained, with two choices a token, and its evaluation."""
    folder = tmp_path_factory.mktemp("run")
    c = tiny.get_config(str(tiny.write_corpus(folder / "text")))
    c.model.moe.router, c.model.num_periods = "gshard", 1
    mesh = partition.make_mesh(c.mesh, jax.devices()[:1])
    opened = run.Run(folder, c, tokenizers.Bytes(), tiny.model(c.model), 5, mesh)
    return opened, run.evaluate_run(opened)


def test_evaluation_writes_the_choices_of_the_whole_split(evaluated):
    opened, result = evaluated
    assert json.loads((opened.workdir / "eval.json").read_text()) == result
    (layer,) = result["routing"]["layers"]
    assert sum(layer["preferred"]) == pytest.approx(1, abs=1e-5)
    together_EE = np.array(layer["coactivation"])
    # two choices a token: on the diagonal those of an expert, off it each token twice
    assert np.trace(together_EE) == together_EE.sum() / 2 == 2 * result["tokens"]
    assert (np.diag(together_EE) / np.trace(together_EE)).tolist() == pytest.approx(layer["load"], abs=1e-5)


def test_watching_does_not_change_the_loss(evaluated):
    opened, result = evaluated
    data = pipeline.load(opened.config.data, opened.tokenizer)
    batches = pipeline.validation_batches(data, opened.config.data)
    alone = evaluate.evaluate(opened.model, evaluate.make_eval_step(opened.mesh), batches, opened.mesh)
    assert (result["loss"], result["tokens"]) == (alone["loss"], alone["tokens"])


@pytest.mark.parametrize(
    ("evaluation", "again"),
    [
        ({"step": 5, "dropped": 0.0, "routing": {}}, False),
        ({"step": 5}, False),  # no MoE
        ({"step": 5, "dropped": 0.0}, True),  # of before there was routing
        ({"step": 4, "dropped": 0.0, "routing": {}}, True),
    ],
)
def test_a_report_evaluates_again_what_lacks_routing(tmp_path, monkeypatch, evaluation, again):
    (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    (tmp_path / "samples.jsonl").write_text('{"step": 5}\n')
    (tmp_path / "eval.json").write_text(json.dumps(evaluation))
    seen = []
    monkeypatch.setattr(run, "load", lambda folder: folder)
    monkeypatch.setattr(run, "evaluate_run", seen.append)
    generation.complete(tmp_path)
    assert seen == [tmp_path] * again
