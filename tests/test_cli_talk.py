"""`ratoon evaluate`, `generate` and `chat` as a user types them, on tiny models made here."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ratoon.cli.chat import Conversation
from ratoon.cli.main import run as ratoon
from ratoon.data.prepare import prepare
from ratoon.generate.lm import LanguageModel, load
from ratoon.generate.sample import Sampling
from ratoon.model.folder import write_model
from ratoon.store.runs import Run
from ratoon.text.chat import render
from ratoon.text.tokenizer import TURN_END, Tokenizer
from test_generate import build
from test_generate_sampling import TEXTS, says, scripted

Typed = tuple[int, str, str]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS * 3, vocab_size=300)


@pytest.fixture(scope="module")
def folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model."""
    path = tmp_path_factory.mktemp("models") / "random"
    LanguageModel(build(vocab_size=tokenizer.vocab_size, eos_ids=()), tokenizer).save(path)
    return path


@pytest.fixture
def type_(own_folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Type a command in a fresh folder; gives exit code, stdout and stderr."""

    def typed(*words: object, stdin: str | bytes | None = None) -> Typed:
        if stdin is not None:
            raw = stdin if isinstance(stdin, bytes) else stdin.encode()
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))
        capfd.readouterr()
        code = ratoon([str(word) for word in words])
        told = capfd.readouterr()
        return code, told.out, told.err

    return typed


# -- evaluate --------------------------------------------------------------------------------------------------------


def test_evaluate_files(type_: Any, folder: Path, own_folder: Path) -> None:
    (own_folder / "a.txt").write_text(TEXTS[0] * 4, encoding="utf-8")
    (own_folder / "b.jsonl").write_text(
        '{"text": "中文的句子"}\n{"text": " "}\n{"text": "stop here"}\n', encoding="utf-8"
    )
    code, out, err = type_("evaluate", folder, "a.txt", "b.jsonl", "--context-tokens", 32)
    assert code == 0
    lines = out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["loss", "perplexity", "bits per byte", "n"]
    assert "3 documents" in lines[3] and "[" in lines[0]
    assert "left out, empty: 1 documents (first: b.jsonl:2)" in err
    assert "runs of" in err and "stride 32" in err

    code, out, err = type_("evaluate", folder, "a.txt", "b.jsonl", "--context-tokens", 32, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["n_bytes"] == len((TEXTS[0] * 4 + "中文的句子stop here").encode())
    assert f"{found['loss']:.4f}" in lines[0] and f"{found['bits_per_byte']:.4f}" in lines[2]
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert found["interval"][0] < found["loss"] < found["interval"][1]
    assert found["ledger"]["accounts"]["empty"]["documents"] == 1


def test_a_shorter_stride_and_a_limit_reach_the_measurement(type_: Any, folder: Path, own_folder: Path) -> None:
    (own_folder / "a.txt").write_text(TEXTS[0] * 40, encoding="utf-8")
    found = {}
    for name, more in {"plain": [], "stride": ["--stride", 8], "limit": ["--limit-tokens", 64]}.items():
        code, out, _ = type_("evaluate", folder, "a.txt", "--context-tokens", 32, "--json", *more)
        assert code == 0
        found[name] = json.loads(out)
    assert found["plain"]["stride_tokens"] == 32 and found["stride"]["stride_tokens"] == 8
    assert found["plain"]["loss"] != found["stride"]["loss"]
    assert found["plain"]["n_tokens"] == found["stride"]["n_tokens"] > found["limit"]["n_tokens"] == 64
    code, out, _ = type_("evaluate", folder, "a.txt", "--json", "--dtype", "bfloat16", "--context-tokens", 32)
    assert json.loads(out)["loss"] == pytest.approx(found["plain"]["loss"], rel=0.05)
    assert "bfloat16" in json.loads(out)["signature"]


def test_lines_as_documents_give_intervals_over_documents(type_: Any, folder: Path, own_folder: Path) -> None:
    (own_folder / "a.txt").write_text("".join(f"line {n} of some\n" for n in range(30)), encoding="utf-8")
    code, out, _ = type_("evaluate", folder, "a.txt", "--split-documents", "lines", "--json")
    found = json.loads(out)
    assert code == 0 and found["interval_of"] == "documents" and found["n_documents"] == 30


def test_evaluate_a_run_on_its_own_held_out_part(type_: Any, tokenizer: Tokenizer, own_folder: Path) -> None:
    (own_folder / "texts.jsonl").write_text("".join(f'{{"text": "number {n} of {n * n}"}}\n' for n in range(60)))
    run = Run.create("small")
    prepared = prepare([own_folder / "texts.jsonl"], run.folder / "data", tokenizer=tokenizer, held_out_fraction=0.4)
    model = build(vocab_size=tokenizer.vocab_size)
    write_model(model, run.model, extra_files=tokenizer.files())
    run.write_state(status="done", evaluation={"context_tokens": 16})
    code, out, _ = type_("evaluate", "small", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["context_tokens"] == 16  # as the run itself measured
    assert found["n_documents"] == prepared.held_out.n_documents
    assert found["n_bytes"] == prepared.held_out.bytes_of_text

    write_model(model, run.model, extra_files=Tokenizer.bytes_only().files(), replace=True)
    code, _, err = type_("evaluate", "small")
    assert code == 2 and "another tokenizer" in err


def test_pairs(type_: Any, folder: Path, own_folder: Path) -> None:
    (own_folder / "p.jsonl").write_text(
        '{"context": "The cat", "continuation": " sat"}\n{"context": "", "continuation": "中文"}\n', encoding="utf-8"
    )
    code, out, err = type_("evaluate", folder, "--pairs", "p.jsonl")
    assert code == 0
    assert [line.rsplit("  ", 1)[1] for line in out.splitlines()[:2]] == ["p.jsonl:1", "p.jsonl:2"]
    assert "n = 2 pairs" in out.splitlines()[2]
    code, out, _ = type_("evaluate", folder, "--pairs", "p.jsonl", "--json")
    found = json.loads(out)
    assert [one["where"] for one in found["pairs"]] == ["p.jsonl:1", "p.jsonl:2"]
    total = sum(one["loglikelihood"] for one in found["pairs"])
    assert found["loss"] == pytest.approx(-total / found["n_tokens"])

    (own_folder / "long.jsonl").write_text(json.dumps({"context": TEXTS[0] * 30, "continuation": " sat"}))
    code, _, err = type_("evaluate", folder, "--pairs", "long.jsonl")
    assert code == 2 and "long.jsonl:1" in err and "--shorten left" in err
    code, out, err = type_("evaluate", folder, "--pairs", "long.jsonl", "--shorten", "left")
    assert code == 0 and "tokens were cut from the left of 1 contexts" in err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "no held-out text belongs to it"),
        (["none.txt"], "no such file"),
        (["a.txt", "--pairs", "p.jsonl"], "both FILE and --pairs"),
        (["--pairs", "p.jsonl", "--stride", "3"], "no effect with --pairs"),
        (["a.txt", "--shorten", "left"], "no effect without --pairs"),
        (["a.txt", "--context-tokens", "65"], "the model's context"),
        (["a.txt", "--stride", "0"], "stride is 0"),
        (["empty.txt"], "nothing can be measured"),
        (["latin.txt"], "not utf-8"),
        (["a.txt", "--device", "nonsense"], "the device 'nonsense' cannot be used"),
        (["--pairs", "none.jsonl"], "no such file"),
    ],
)
def test_evaluate_refuses(type_: Any, folder: Path, own_folder: Path, words: list[str], told: str) -> None:
    (own_folder / "a.txt").write_text(TEXTS[0] * 4, encoding="utf-8")
    (own_folder / "p.jsonl").write_text('{"context": "a", "continuation": "b"}\n')
    (own_folder / "empty.txt").write_text("")
    (own_folder / "latin.txt").write_bytes("für".encode("latin-1"))
    code, out, err = type_("evaluate", folder, *words)
    assert code == 2 and told in err and out == "" and "Traceback" not in err


def test_errors_are_json_too(type_: Any, folder: Path) -> None:
    code, out, _ = type_("evaluate", folder, "none.txt", "--json")
    assert code == 2 and json.loads(out)["error"] == "DataError"


# -- generate --------------------------------------------------------------------------------------------------------


def test_generate(type_: Any, tokenizer: Tokenizer, own_folder: Path) -> None:
    says(tokenizer, "The cat", " sat on 中文🙂.").save("m")
    code, out, err = type_("generate", "m", "The cat")
    assert (code, out) == (0, " sat on 中文🙂.\n")
    assert "the model ended it" in err
    code, out, err = type_("generate", "m", "The cat", "--stream", "--stop", "中", "--max-new-tokens", 50)
    assert (code, out) == (0, " sat on \n")
    assert "a stop text" in err
    code, out, err = type_("generate", "m", "-", stdin="The cat\n")
    assert (code, out) == (0, " sat on 中文🙂.\n")


def test_generate_as_json(type_: Any, folder: Path) -> None:
    words = ["generate", folder, "The cat", "中文", "--max-new-tokens", 7, "--temperature", 0.9, "--top-k", 20]
    words += ["--top-p", 0.9, "--min-p", 0.01, "--repetition-penalty", 1.1, "--seed", 4, "--json"]
    code, out, _ = type_(*words)
    found = json.loads(out)
    assert code == 0
    wanted = load(folder).generate(
        ["The cat", "中文"],
        max_new_tokens=7,
        temperature=0.9,
        top_k=20,
        top_p=0.9,
        min_p=0.01,
        repetition_penalty=1.1,
        seed=4,
        logprobs=True,
    )
    for one, answer in zip(found["answers"], wanted, strict=True):
        assert (one["ids"], one["text"], one["finish"]) == (answer.ids, answer.text, answer.finish)
        assert one["logprobs"] == pytest.approx(answer.logprobs)
    assert found["sampling"]["top_k"] == 20


def test_several_prompts_and_beams(type_: Any, folder: Path) -> None:
    code, out, err = type_("generate", folder, "The cat", "stop", "--max-new-tokens", 4, "--min-new-tokens", 2)
    texts = [one.text for one in load(folder).generate(["The cat", "stop"], max_new_tokens=4)]
    assert (code, out) == (0, "".join(f"{text}\n" for text in texts))
    assert "> The cat" in err and "> stop" in err
    code, out, _ = type_("generate", folder, "The cat", "--max-new-tokens", 4, "--beams", 3, "--length-penalty", 0.5)
    (wanted,) = load(folder).generate(["The cat"], max_new_tokens=4, num_beams=3, length_penalty=0.5)
    assert (code, out) == (0, f"{wanted.text}\n")


def test_escapes_of_stop_texts(type_: Any, tokenizer: Tokenizer, own_folder: Path) -> None:
    says(tokenizer, "x", "one\ntwo").save("m")
    assert type_("generate", "m", "x", "--stop", "\\n")[1] == "one\n"
    assert type_("generate", "m", "x", "--stop", "\\\\n")[1] == "one\ntwo\n"


def test_a_prompt_too_long(type_: Any, folder: Path) -> None:
    prompt = TEXTS[0] * 30
    code, out, err = type_("generate", folder, prompt)
    assert code == 2 and out == "" and "--shorten left" in err
    code, out, err = type_("generate", folder, prompt, "--shorten", "left", "--max-new-tokens", 4)
    assert code == 0 and "tokens were cut from its left" in err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["x", "--top-k", "0", "--temperature", "1"], "top_k"),
        (["x", "--top-k", "5"], "no effect at temperature 0"),
        (["x", "y", "--stream"], "--stream cannot be had"),
        (["x", "--stream", "--json"], "--stream cannot be had"),
        (["x", "--beams", "2", "--stream"], "--stream cannot be had"),
        (["x", "--beams", "2", "--temperature", "0.5"], "beam search draws nothing"),
        (["x", "--max-new-tokens", "0"], "max_new_tokens"),
        (["x", "--dtype", "float8"], "float8"),
        ([], "PROMPT"),
    ],
)
def test_generate_refuses(type_: Any, folder: Path, words: list[str], told: str) -> None:
    code, out, err = type_("generate", folder, *words)
    assert code == 2 and told in err and "Traceback" not in err


def test_what_is_no_model_and_what_is_no_text(type_: Any, folder: Path, own_folder: Path) -> None:
    code, _, err = type_("generate", "nothing", "x")
    assert code == 2 and "there is no model 'nothing'" in err
    for name, makes in (("base-zh", True), ("clue-tnews", False), ("recipes/base-zh", False)):
        code, _, err = type_("generate", name, "x")
        assert code == 2 and (f"`ratoon pretrain {name}` makes the model" in err) == makes
    code, _, err = type_("generate", folder, "-", stdin=b"a\xff")
    assert code == 2 and "not UTF-8 at byte 1" in err
    write_model(load(folder).model, own_folder / "bare")
    code, _, err = type_("generate", "bare", "x")
    assert code == 2 and "has none" in err
    code, _, err = type_("generate", folder, "-", "--max-new-tokens", 2, stdin="")
    assert code == 0  # nothing at all is the beginning of a document


# -- chat ------------------------------------------------------------------------------------------------------------


def chatting(tokenizer: Tokenizer, *turns: tuple[list[dict[str, str]], str], **more: Any) -> LanguageModel:
    """A model that answers each of these conversations by heart."""
    end = tokenizer.token_id(TURN_END)
    assert end is not None
    return scripted(
        tokenizer,
        {
            len(render(tokenizer, messages, add_generation_prompt=True).ids): [*tokenizer.encode(answer), end]
            for messages, answer in turns
        },
        **more,
    )


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_a_conversation_through_a_pipe(type_: Any, tokenizer: Tokenizer, own_folder: Path) -> None:
    talk = [user("hi"), assistant("The cat."), user("and?")]
    chatting(tokenizer, (talk[:1], "The cat."), (talk, "中文🙂")).save("m")
    code, out, err = type_(
        "chat", "m", "--temperature", 0, stdin="hi\n\nand?\n/save talk.json\n/what\n/help\n/quit\nnever read\n"
    )
    assert (code, out) == (0, "The cat.\n中文🙂\n")
    saved = json.loads((own_folder / "talk.json").read_text(encoding="utf-8"))
    assert saved["messages"] == [*talk, assistant("中文🙂")]
    assert "there is no command /what" in err and "/reset" in err and "saved: talk.json" in err

    code, out, _ = type_("chat", "m", "--temperature", 0, "--json", stdin="hi\nand?")
    found = json.loads(out)
    assert code == 0 and found["messages"] == saved["messages"]
    assert [one["finish"] for one in found["answers"]] == ["eos", "eos"]


def test_reset_and_system(type_: Any, tokenizer: Tokenizer, own_folder: Path) -> None:
    told = [{"role": "system", "content": "be brief"}, user("hi")]
    chatting(tokenizer, ([user("hi")], "long answer"), (told, "brief")).save("m")
    code, out, _ = type_(
        "chat", "m", "--temperature", 0, stdin="hi\n/reset\nhi\n/system be brief\nhi\n/system\nhi\n//x is text\n"
    )
    assert code == 0 and out.splitlines()[:4] == ["long answer", "long answer", "brief", "long answer"]
    code, out, _ = type_("chat", "m", "--system", "be brief", "--temperature", 0, "--json", stdin="hi\n")
    assert json.loads(out)["messages"] == [*told, assistant("brief")]
    code, out, _ = type_("chat", "m", "--temperature", 0, "--json", stdin="//x is text\n")
    assert json.loads(out)["messages"][0] == user("/x is text")


def test_retry_draws_again(type_: Any, folder: Path) -> None:
    words = ["chat", folder, "--max-new-tokens", 6, "--json", "--seed", 3]
    _, out, _ = type_(*words, stdin="hi\n/retry\n/retry\n")
    found = json.loads(out)
    assert [one["seed"] for one in found["answers"]] == [3, 4, 5]
    assert len({one["text"] for one in found["answers"]}) == 3
    assert found["messages"] == [user("hi"), assistant(found["answers"][-1]["text"])]
    _, again, _ = type_(*words, stdin="hi\n")
    assert json.loads(again)["answers"][0]["text"] == found["answers"][0]["text"]
    code, _, err = type_(*words, stdin="/retry\n")
    assert code == 0 and "no answer yet" in err


def test_defaults_draw_and_can_be_turned_off(type_: Any, folder: Path) -> None:
    _, out, _ = type_("chat", folder, "--json", "--max-new-tokens", 2, stdin="hi\n")
    assert json.loads(out)["sampling"]["temperature"] == 0.7 and json.loads(out)["sampling"]["top_p"] == 0.95
    _, out, _ = type_("chat", folder, "--json", "--max-new-tokens", 2, "--top-k", 4, stdin="hi\n")
    assert json.loads(out)["sampling"]["top_p"] is None
    code, out, _ = type_("chat", folder, "--json", "--max-new-tokens", 2, "--temperature", 0, stdin="hi\n")
    assert code == 0 and json.loads(out)["sampling"]["temperature"] == 0


def test_a_conversation_that_outgrows_the_context(type_: Any, tokenizer: Tokenizer, own_folder: Path) -> None:
    said = ["a" * 20, "b" * 20, "c" * 20]
    lm = LanguageModel(build(vocab_size=tokenizer.vocab_size, context_tokens=96, eos_ids=()), tokenizer)
    lm.save("m")
    words = ["chat", "m", "--max-new-tokens", 20, "--temperature", 0]
    code, out, err = type_(*words, stdin="\n".join(said))
    assert code == 2 and "the conversation has" in err and "/reset" in err and "--shorten left" in err
    assert len(out.splitlines()) >= 1  # what fitted was answered
    code, out, err = type_(*words, "--shorten", "left", "--json", stdin="\n".join(said))
    assert code == 0 and "oldest 2 messages are left out" in err
    found = json.loads(out)
    assert [one["content"] for one in found["messages"] if one["role"] == "user"] == said  # nothing is forgotten
    left_out = int(err.rsplit("oldest ", 1)[1].split()[0])
    assert left_out in (2, 4)
    seen = found["messages"][left_out:-1]  # a question first, and all that followed
    assert seen[0]["role"] == "user"
    assert found["answers"][-1]["text"] == lm.chat(seen, max_new_tokens=20).text
    code, out, err = type_(*words, "--shorten", "left", stdin="x" * 200)
    assert code == 0 and "tokens were cut from the left" in err


def test_a_model_that_is_no_chat_model(type_: Any, tokenizer: Tokenizer, own_folder: Path) -> None:
    lm = says(tokenizer, "The cat", " sat.")
    write_model(lm.model, "taught", extra_files=tokenizer.files(), facts={"chat": False})
    code, out, err = type_("chat", "taught", stdin="hi\n")
    assert code == 2 and "never taught to answer" in err and "--plain" in err and out == ""

    plain = Tokenizer.train(TEXTS, vocab_size=280, special_tokens=["<|endoftext|>"])
    bare = LanguageModel(build(vocab_size=plain.vocab_size), plain)
    bare.save("bare")
    code, _, err = type_("chat", "bare", stdin="hi\n")
    assert code == 2 and "no chat template" in err and "--plain" in err

    code, out, err = type_("chat", "taught", "--plain", "--temperature", 0, "--json", stdin="The cat\n")
    assert code == 0 and json.loads(out)["text"] == "The cat sat." and "ended the text" in err
    code, out, _ = type_("chat", "taught", "--plain", "--temperature", 0, stdin="The cat\n")
    assert (code, out) == (0, " sat.\n")
    code, _, err = type_("chat", "taught", "--plain", "--system", "x", stdin="")
    assert code == 2 and "no effect with --plain" in err


def test_plain_text_goes_on_and_can_be_retried(type_: Any, folder: Path) -> None:
    words = ["chat", folder, "--plain", "--max-new-tokens", 3, "--json"]
    found = json.loads(type_(*words, stdin="The cat\n on\n/retry\n")[1])
    first, second, third = (one["text"] for one in found["answers"])
    assert found["text"] == f"The cat{first} on{third}"
    assert second != third


def test_saving_where_nothing_can_be_saved(type_: Any, folder: Path, own_folder: Path) -> None:
    code, _, err = type_("chat", folder, stdin="/save\n/save none/x.json\n/save .\n")
    assert code == 0 and err.count("not saved") == 2 and "say where" in err


def test_a_line_that_is_no_text(type_: Any, folder: Path) -> None:
    code, _, err = type_("chat", folder, stdin=b"/help\n\xff\n")
    assert code == 2 and "stdin:2" in err


def test_an_answer_that_is_interrupted_stays_as_far_as_it_came(tokenizer: Tokenizer, monkeypatch: Any) -> None:
    lm = chatting(tokenizer, ([user("hi")], "The cat sat on the mat."))
    talker = Conversation(lm, Sampling(max_new_tokens=60), None)
    shown: list[str] = []

    def show(text: str, nl: bool = True, **more: Any) -> None:
        shown.append(text)
        if "cat" in "".join(shown):
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("click.echo", lambda text="", nl=True, **more: show(text) if not nl else None)
        with pytest.raises(KeyboardInterrupt):
            talker.hear("hi")
    assert talker.messages == [user("hi"), assistant("".join(shown))]
    assert talker.answers == []


# -- the shell -------------------------------------------------------------------------------------------------------


def test_through_a_real_shell(tokenizer: Tokenizer, own_folder: Path) -> None:
    """Bytes on a real pipe, in a locale without UTF-8."""
    says(tokenizer, "中", "文🙂").save("m")
    environment = {**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "ratoon", "chat", "m", "--plain", "--temperature", "0"],
        input="中\n".encode(),
        capture_output=True,
        env=environment,
        timeout=120,
    )
    assert (done.returncode, done.stdout.decode()) == (0, "文🙂\n"), done.stderr.decode()


def test_at_a_terminal(tokenizer: Tokenizer, own_folder: Path) -> None:
    """A pseudo-terminal: an error does not end the conversation, and text streams."""
    pty = pytest.importorskip("pty")
    LanguageModel(build(vocab_size=tokenizer.vocab_size, context_tokens=48), tokenizer).save("m")
    ours, theirs = pty.openpty()
    words = [sys.executable, "-m", "ratoon", "chat", "m", "--max-new-tokens", "3"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb"}
    process = subprocess.Popen(words, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    os.write(ours, b"x" * 200 + b"\nhi\n/quit\n")
    told = b""
    try:
        while chunk := os.read(ours, 1 << 12):
            told += chunk
    except OSError:  # the other side is closed
        pass
    os.close(ours)
    assert process.wait(timeout=60) == 0, told.decode(errors="replace")
    text = told.decode(errors="replace")
    assert text.index("the conversation has") < text.index("3 tokens after")
    assert "Traceback" not in text


def test_help_of_the_three_verbs_needs_no_torch() -> None:
    for verb in ("evaluate", "generate", "chat"):
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                "import sys; from ratoon.cli.main import run; code = run([sys.argv[1], '--help']); "
                "assert code == 0 and 'torch' not in sys.modules",
                verb,
            ],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        assert "MODEL" in done.stdout
