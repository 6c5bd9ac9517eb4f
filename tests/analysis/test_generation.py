"""Text comes out as it is certain, ends before a stop string, and is the same however its tokens arrive."""

import argparse
import dataclasses
import itertools
import json
import pathlib
import random

import pytest
import tiny

from moejax import config as config_lib
from moejax.analysis import generation
from moejax.analysis import run as run_lib
from moejax.data import corruption, tokenizers
from moejax.models import model as model_lib

BYTES = tokenizers.Bytes()


def feed(tokens, stop=(), tokenizer=BYTES, cuts=()):
    """The continuation of tokens that arrive in pieces, and the pieces of text that it gave."""
    text = generation.Continuation("", tokenizer, stop)
    edges = [0, *cuts, len(tokens)]
    pieces = [text.add(tokens[a:b]) for a, b in itertools.pairwise(edges)]
    return text, [*pieces, text.finish()]


def one_by_one(string, stop=()):
    tokens = list(string.encode())
    return feed(tokens, stop, cuts=range(1, len(tokens)))


@pytest.mark.parametrize(
    ("string", "stop", "text", "ended"),
    [
        ("the river", (), "the river", "length"),
        ("the river", ("riv",), "the ", "stop"),
        ("the river", ("rivet", "z"), "the river", "length"),  # only begins like one
        ("the river", ("ver", "e r"), "th", "stop"),  # the first to occur, not the first named
        ("aaab", ("aab",), "a", "stop"),  # overlaps its own beginning
        ("ababac", ("abac", "bb"), "ab", "stop"),
        ("stop", ("stop",), "", "stop"),
        ("día é.", ("é",), "día ", "stop"),  # a character of two bytes
        ("日本語", ("本",), "日", "stop"),
        ("a\n\nb", ("\n\n",), "a", "stop"),
        ("ends in sto", ("stop",), "ends in sto", "length"),
    ],
)
def test_a_table_worked_by_hand(string, stop, text, ended):
    actual, pieces = one_by_one(string, stop)
    assert (actual.text, actual.ended) == (text, ended)
    assert "".join(pieces) == text


def test_pieces_end_at_whole_characters_and_hold_back_what_may_become_a_stop_string():
    _, pieces = one_by_one("é日x")
    assert pieces == ["", "é", "", "", "日", "x", ""]
    _, pieces = one_by_one("ab stx stop", ("stop",))
    assert pieces == ["a", "b", " ", "", "", "stx", " ", "", "", "", "", ""]


def test_bytes_that_are_no_character_come_out_as_such_at_the_latest_at_the_end():
    text, pieces = feed([0xE6, 0x97], cuts=[1])
    assert pieces[:-1] == ["", ""]
    assert text.text == bytes([0xE6, 0x97]).decode(errors="replace")
    text, pieces = feed([0xFF, ord("a"), 0xFF, ord("b")], cuts=[1, 2, 3])
    assert pieces == ["", "\ufffda", "", "\ufffdb", ""]


def test_end_of_text_ends_it_and_is_not_counted():
    text, pieces = feed([*b"ab", BYTES.end_of_text, *b"cd"], ("bx",))
    assert (text.text, text.ended, text.num_tokens) == ("ab", "end_of_text", 2)
    assert pieces == ["ab", ""]


def test_text_and_stop_do_not_depend_on_how_tokens_cut_the_text():
    """Random texts, stop strings and cuts; tokens of bytes and of a trained BPE; against str.find on the whole text."""
    rng, letters = random.Random(0), "aabbé日 "
    corpus = ["".join(rng.choices(letters, k=60)) for _ in range(50)]
    bpe = tokenizers.Bpe.train(corpus, 300)
    stopped = 0
    for _ in range(300):
        string = "".join(rng.choices(letters, k=rng.randrange(30)))
        stop = ["".join(rng.choices(letters, k=rng.randrange(1, 5))) for _ in range(rng.randrange(4))]
        found = [place for place in map(string.find, stop) if place >= 0]
        expected = string[: min(found, default=len(string))]
        for tokenizer in (BYTES, bpe):
            tokens = tokenizer.encode(string)
            cuts = sorted(rng.randrange(len(tokens) + 1) for _ in range(3))
            text, pieces = feed(tokens, stop, tokenizer, cuts)
            assert text.text == "".join(pieces) == expected
            assert text.ended == ("stop" if found else "length")
            assert found or text.num_tokens == len(tokens)
        stopped += bool(found)
    assert 50 < stopped < 250


def arguments(**changes) -> argparse.Namespace:
    options = {"prompt": ["a"], "prompts": None, "num_tokens": 5, "num_samples": 1, "temperature": 1.0, "top_k": 0}
    options |= {"top_p": 1.0, "seed": 0, "stop": [], "max_length": 0, "label": "", "stream": None, "json": False}
    return argparse.Namespace(**options | changes)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"num_tokens": 0}, "--num_tokens=0 must be 1 or more"),
        ({"num_samples": 0}, "--num_samples=0 must be 1 or more"),
        ({"temperature": -1.0}, "--temperature=-1.0 must be 0 or more"),
        ({"temperature": float("nan")}, "--temperature=nan must be 0 or more, and finite; change it"),
        ({"top_k": -1}, "--top_k=-1 must be 0 or more"),
        ({"top_p": 0.0}, "--top_p=0.0 must lie in (0, 1], where 1 keeps all; change it"),
        ({"top_p": 1.1}, "--top_p=1.1 must lie in (0, 1]"),
        ({"stop": ["x", ""]}, "--stop= is empty"),
        ({"prompt": []}, "there is no prompt; give --prompt or"),
    ],
)
def test_what_can_not_be_asked_for_is_one_line(changes, line):
    with pytest.raises(config_lib.ConfigError) as caught:
        generation.request(arguments(**changes))
    assert line in str(caught.value)


def test_prompts_of_a_file_follow_those_of_the_command_line_a_line_each(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\ntwo, three\n")
    assert generation.request(arguments(prompts=file)).prompts == ("a", "one", "", "two, three")
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(config_lib.ConfigError, match=r"prompts\.txt is not UTF-8 text; convert it"):
        generation.request(arguments(prompts=file))


def test_several_continuations_do_not_stream(monkeypatch):
    def streams(**changes):
        asked = arguments(**changes)
        return generation.streams(asked, generation.request(asked))

    for many in ({"num_samples": 2}, {"prompt": ["a", "b"]}):
        with pytest.raises(config_lib.ConfigError, match=r"--stream shows one .* 2 continuations would mix; leave it"):
            streams(stream=True, **many)
    with pytest.raises(config_lib.ConfigError, match="--json prints whole lines"):
        streams(stream=True, json=True)
    assert streams(stream=True)
    assert not streams()  # pytest's standard output is no terminal
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert streams()
    assert not streams(stream=False)
    assert not streams(num_samples=2)
    assert not streams(json=True)


@pytest.mark.parametrize(
    ("period", "max_length", "line"),
    [
        (("attention",), 0, "data.seq_length, the rows that attention was trained on,=32"),
        (("mamba",), 30, "--max_length=30"),
        (("attention",), 30, "--max_length=30"),
    ],
)
def test_a_prompt_too_long_says_by_how_much(period, max_length, line):
    config = tiny.get_config("x")
    config.model.period = period
    run = run_lib.Run(pathlib.Path("x"), config, BYTES, model_lib.abstract(config.model), 1, None)  # type: ignore
    request = generation.Request(prompts=("a", "b" * 20), num_tokens=12, max_length=max_length)
    with pytest.raises(config_lib.ConfigError) as caught:
        generation.write(run, request)
    expected = f"prompt 2 of 2 has 21 tokens and --num_tokens=12 more are asked for, together over {line}; shorten"
    assert str(caught.value).startswith(expected)


@pytest.fixture
def sample_of(tmp_path, monkeypatch):
    """The request of a report's sample of a run with a checkpoint and its evaluation; None: it has no sample."""

    def asked(config):
        (tmp_path / "checkpoints" / "5").mkdir(parents=True)
        (tmp_path / "eval.json").write_text('{"step": 5}')
        run = run_lib.Run(tmp_path, config, BYTES, None, 5, None)  # type: ignore
        seen = []
        monkeypatch.setattr(run_lib, "load", lambda _: run)
        monkeypatch.setattr(generation, "write", lambda _, request: seen.append(request))
        generation.complete(tmp_path)
        assert len(seen) <= 1
        return seen[0] if seen else None

    return asked


def encoder_decoder():
    c = config_lib.Config()
    c.model.encoder_period, c.model.num_encoder_periods = ("attention", "moe"), 1
    c.model.period = ("attention", "cross_attention", "mlp")
    c.data.objective, c.data.seq_length = "span_corruption", 12
    return c


@pytest.mark.parametrize(
    ("inputs", "prompt"), [((" ", "is it?", "so?"), "is it?"), (("0" * 12, "0" * 11), "0" * 11), (("0" * 12,), None)]
)
def test_a_report_s_sample_of_pairs_is_of_the_first_held_out_input_that_fits(sample_of, tmp_path, inputs, prompt):
    for name, texts in (("train", ["other"]), ("held", inputs)):
        rows = [json.dumps({"input": text, "target": "y"}) for text in texts]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    c = encoder_decoder()
    c.data.objective, c.data.packing, c.data.text_field, c.data.target_field = "text_to_text", "pad", "input", "target"
    c.data.source, c.data.validation_source = f"files:{tmp_path}/train.jsonl", f"files:{tmp_path}/held.jsonl"
    c.data.target_length = 40
    request = sample_of(c)
    if prompt is None:
        assert request is None
        return
    assert (request.prompts, request.num_tokens) == ((prompt,), 40)
    run = run_lib.Run(tmp_path, c, BYTES, model_lib.abstract(c.model), 5, None)  # type: ignore
    generation._check_length(run, [generation._encode(run, prompt)], request)
    over = dataclasses.replace(request, num_tokens=41)
    with pytest.raises(config_lib.ConfigError, match="--num_tokens=41 is over 40, the longer of "):
        generation._check_length(run, [[1]], over)
    with pytest.raises(config_lib.ConfigError, match=r"--prompt has 13 tokens, over data\.seq_length, .*=12; "):
        generation._check_length(run, [[1] * 13], request)


def test_a_report_s_sample_of_an_encoder_decoder_is_of_a_sentinel(sample_of):
    c = encoder_decoder()
    request = sample_of(c)
    assert (request.prompts, request.num_tokens) == (("<extra_id_0>",), corruption.row_lengths(c.data)[1])


def test_a_report_of_a_model_that_cannot_write_has_no_sample(sample_of):
    c = encoder_decoder()
    c.model.moe.router = "expert_choice"
    assert sample_of(c) is None
