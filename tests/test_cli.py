"""The command line: what it costs, what it prints where, and that every mistake ends in one line and the right code."""

import asyncio
import contextlib
import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from swarmnode import cli
from swarmnode.node import commands, reports
from swarmnode.node.client.generate import GenerationStats, Piece
from swarmnode.node.console import Console
from swarmnode.node.runtime import RuntimeFile
from swarmnode.protocol import errors
from swarmnode.protocol.ids import PrivateKey
from swarmnode.protocol.invite import Invite
from swarmnode.protocol.multiaddr import Multiaddr
from swarmnode.protocol.sampling import SamplingParams

PEER = PrivateKey.from_seed(bytes(32)).peer_id
ADDRESS = f"/ip4/127.0.0.1/tcp/4001/p2p/{PEER}"
VERBS = ("join", "generate", "chat", "status", "peers", "models", "route", "ping", "invite", "trace", "bench", "id")


@pytest.fixture(autouse=True)
def own_folders(tmp_path, monkeypatch):
    """No test sees the user's settings, keys or running nodes."""
    for name in list(os.environ):
        if name.startswith("SWARMNODE_"):
            monkeypatch.delenv(name)
    for name in ("data", "cache", "state"):
        monkeypatch.setenv(f"SWARMNODE_{name.upper()}_DIR", str(tmp_path / name))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("SWARMNODE_LAN", "no")
    return tmp_path


def run(*args):
    """(exit code, stdout, stderr) of a command run in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.run(list(args))
    return code, out.getvalue(), err.getvalue()


def assert_error(result, code, *words):
    got, out, err = result
    assert got == code
    assert out == ""
    lines = err.strip().splitlines()
    assert lines[-1].startswith("error: ")
    assert "Traceback" not in err
    for word in words:
        assert word in lines[-1]


# What it costs


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True).stdout


def test_help_loads_nothing_heavy():
    loaded = python(
        "import sys\n"
        "from swarmnode import cli\n"
        "cli.run(['--help']); cli.run(['join', '--help'])\n"
        "print(sorted(m for m in sys.modules if m.partition('.')[0] in"
        " ('torch','rich','cryptography','asyncio','http','tokenizers','numpy','platformdirs')))"
    )
    assert loaded.strip().splitlines()[-1] == "[]"


def test_help_takes_less_than_150_ms_of_cpu():
    code = "import time\nfrom swarmnode import cli\ncli.run(['--help'])\nprint(time.process_time())"
    assert min(float(python(code).strip().splitlines()[-1]) for _ in range(3)) < 0.15


def test_every_verb_has_help_and_the_page_is_fresh():
    for verb in VERBS:
        code, out, _ = run(verb, "--help")
        assert code == 0
        assert out.startswith(f"Usage: swarmnode {verb}")
    page = Path(cli.__file__).parent / "docs" / "generate_cli.py"
    spec = importlib.util.spec_from_file_location("generate_cli", page)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text() == module.page(), "run python docs/generate_cli.py"


# Mistakes


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["frobnicate"], ["No such command 'frobnicate'", "--help"]),
        (["join", "--bogus"], ["No such option", "swarmnode join --help"]),
        (["generate"], ["Missing argument", "PROMPT"]),
        (["join", "--serve", "3:3"], ["3:3 is empty"]),
        (["join", "--serve", "9:3"], ["9:3 is empty"]),
        (["join", "--serve", "all"], ["'all'", "0:9", "auto", "none"]),
        (["join", "--serve", "-1:3"], ["'-1:3'"]),
        (["join", "--serve", "1:2:3"], ["'1:2:3'"]),
        (["join", "--serve", "0:" + "9" * 40], ["use A:B"]),
        (["join", "--listen", "10.0.0.1:4001"], ["malformed address '10.0.0.1:4001'", "/ip4/"]),
        (["join", "--peer", "/ip4/10.0.0.1/tcp/4001"], ["lacks its peer id", "/p2p/"]),
        (["join", "--peer", "/ip4/10.0.0.300/tcp/1"], ["10.0.0.300"]),
        (["join", "--swarm", "a b"], ["swarm name 'a b'"]),
        (["join", "--public-name", "x" * 99], ["public name"]),
        (["generate", "hi", "--temperature", "-1"], ["temperature is -1", "0 to 100"]),
        (["generate", "hi", "--temperature", "nan"], ["temperature is nan"]),
        (["generate", "hi", "--temperature", "hot"], ["--temperature", "hot"]),
        (["generate", "hi", "--top-p", "0"], ["top_p is 0"]),
        (["generate", "hi", "--top-p", "1.5"], ["top_p is 1.5"]),
        (["generate", "hi", "--top-k", "-1"], ["top_k is -1"]),
        (["generate", "hi", "--min-p", "2"], ["min_p is 2"]),
        (["generate", "hi", "--seed", "-1"], ["seed is -1"]),
        (["generate", "hi", "--repetition-penalty", "0"], ["repetition_penalty is 0"]),
        (["generate", "hi", "--frequency-penalty", "101"], ["frequency_penalty is 101", "-100 to 100"]),
        (["generate", "hi", "--presence-penalty", "x"], ["--presence-penalty", "'x'"]),
        (["generate", "hi", "--penalty-last-n", "-1"], ["penalty_last_n is -1"]),
        (["generate", "hi", "--logit-bias", "7"], ["--logit-bias '7'", "ID=BIAS"]),
        (["generate", "hi", "--logit-bias", "7=x"], ["--logit-bias '7=x'", "ID=BIAS"]),
        (["generate", "hi", "--logit-bias", "7=101"], ["logit_bias of token 7 is 101", "-100 to 100"]),
        (["generate", "hi", "--logit-bias", "7=1", "--logit-bias", "7=2"], ["token 7 twice"]),
        (["generate", "hi", "--logprobs", "-1"], ["--logprobs is -1", "0 to 100"]),
        (["generate", "hi", "--stop-token", "x"], ["--stop-token", "'x'"]),
        (["generate", "hi", "--speculate", "always"], ["--speculate is 'always'", "auto, ngram, off"]),
        (["generate", "hi", "--draft", "m", "--speculate", "off"], ["--draft", "auto"]),
        (["generate", "hi", "--max-new-tokens", "0"], ["--max-new-tokens is 0", "at least 1"]),
        (["generate", "hi", "--wire", "fp16"], ["unknown wire codec 'fp16'", "bf16"]),
        (["ping", "nowhere"], ["malformed address 'nowhere'"]),
        (["ping", ADDRESS, "-c", "0"], ["--count"]),
        (["models"], ["no node of the swarm 'main' is known", "--peer"]),
        (["--config", "/nowhere/x.toml", "models"], ["no settings file /nowhere/x.toml"]),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(args, words):
    assert_error(run(*args), 2, *words)


def test_an_unreachable_peer_is_named():
    code, out, err = run("models", "--peer", f"/ip4/127.0.0.1/tcp/1/p2p/{PEER}")
    assert_error((code, out, err), 1, "/ip4/127.0.0.1/tcp/1", "refused")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.ModelNotFound("gone"), 1),
        (errors.ConfigError("wrong"), 2),
        (errors.NoRoute("no server holds blocks 6:12 of m"), 3),
        (errors.ServerBusy("full"), 4),
        (errors.DeadlineExceeded("late"), 5),
        (errors.ServerFailed("two\nlines"), 1),
        (KeyboardInterrupt(), 130),
        (OSError(28, "No space left on device", "/x"), 1),
        (ExceptionGroup("g", [ExceptionGroup("h", [errors.NoRoute("none")]), ValueError("x")]), 3),
    ],
)
def test_errors_become_exit_codes(monkeypatch, error, code):
    async def fail(*args):
        raise error

    monkeypatch.setattr(commands, "generate", fail)
    got, out, err = run("generate", "hi")
    assert (got, out) == (code, "")
    assert err.count("\n") == 1


def test_a_bug_is_not_hidden(monkeypatch):
    async def fail(*args):
        raise ExceptionGroup("bug", [ZeroDivisionError()])

    monkeypatch.setattr(commands, "generate", fail)
    with pytest.raises(ExceptionGroup):
        run("generate", "hi")


# Settings


@pytest.fixture
def asked(monkeypatch):
    """What `generate` was asked to do, without doing it."""
    seen = SimpleNamespace()

    async def record(config, prompt, how, console):
        seen.config, seen.prompt, seen.how = config, prompt, how
        return 0

    monkeypatch.setattr(commands, "generate", record)
    return seen


def test_a_flag_beats_the_environment_beats_the_file_beats_the_default(asked, monkeypatch, tmp_path):
    assert run("generate", "hi")[0] == 0
    assert (asked.how.max_new_tokens, asked.config.swarm, asked.how.sampling.temperature) == (256, "main", 0.0)
    settings = tmp_path / "config" / "swarmnode" / "config.toml"
    settings.parent.mkdir(parents=True)
    settings.write_text(f'max-new-tokens = 5\ntemperature = 1\nswarm = "file"\npeer = ["{ADDRESS}"]\nserve = "none"\n')
    assert run("generate", "hi")[0] == 0
    assert (asked.how.max_new_tokens, asked.config.swarm, asked.how.sampling.temperature) == (5, "file", 1.0)
    assert asked.config.peers == (ADDRESS,)
    monkeypatch.setenv("SWARMNODE_MAX_NEW_TOKENS", "6")
    monkeypatch.setenv("SWARMNODE_SWARM", "environment")
    assert run("generate", "hi")[0] == 0
    assert (asked.how.max_new_tokens, asked.config.swarm, asked.how.sampling.temperature) == (6, "environment", 1.0)
    assert run("generate", "hi", "--max-new-tokens", "7")[0] == 0
    assert (asked.how.max_new_tokens, asked.config.swarm) == (7, "environment")


def test_every_option_of_a_generation_arrives(asked):
    words = (
        "--temperature 0.5 --top-p 0.9 --top-k 5 --min-p 0.1 --repetition-penalty 1.2 --frequency-penalty 0.3 "
        "--presence-penalty -0.4 --penalty-last-n 64 --logit-bias 7=-1.5 --logit-bias 9=2 --logprobs 3 --stop a "
        "--stop b --stop-token 4 --stop-token 5 --seed 8 --wire bf16 --draft small --stats --max-new-tokens 11"
    )
    assert run("generate", "hi", *words.split())[0] == 0
    options = asked.how.options
    assert options.pop("sampling") == SamplingParams(
        temperature=0.5,
        top_p=0.9,
        top_k=5,
        min_p=0.1,
        repetition_penalty=1.2,
        frequency_penalty=0.3,
        presence_penalty=-0.4,
        penalty_last_n=64,
        logit_bias={7: -1.5, 9: 2},
        seed=8,
    )
    assert options == {
        "max_new_tokens": 11,
        "stop": ("a", "b"),
        "stop_token_ids": (4, 5),
        "top_logprobs": 3,
        "wire": "bf16",
        "speculate": "auto",
        "draft": "small",
    }


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("max_new_token = 5", ["unknown setting 'max_new_token'", "max_new_tokens"]),
        ("json = true", ["unknown setting 'json'"]),
        ("swarm = ", ["not valid TOML"]),
        ("[peer]\nx = 1", ["setting 'peer'"]),
        ('max-new-tokens = "many"', ["many"]),
        ("temperature = -4", ["temperature is -4"]),
    ],
)
def test_wrong_settings_files(tmp_path, text, words):
    path = tmp_path / "settings.toml"
    path.write_text(text)
    assert_error(run("--config", str(path), "generate", "hi"), 2, *words)


def test_odd_settings_files(tmp_path, monkeypatch):
    path = tmp_path / "settings.toml"
    path.write_bytes(b"swarm = '\xff'")
    assert_error(run("--config", str(path), "models"), 2, "not UTF-8")
    path.write_text("# " + "x" * 300_000)
    assert_error(run("--config", str(path), "models"), 2, "over 262144 bytes")
    assert_error(run("--config", str(tmp_path), "models"), 2, "cannot read settings")


def test_prompt_from_stdin(asked, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("Grüße".encode())))
    assert run("generate", "-")[0] == 0
    assert asked.prompt == "Grüße"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff")))
    assert_error(run("generate", "-"), 2, "not UTF-8")
    monkeypatch.setattr(cli, "_MAX_PROMPT_BYTES", 3)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"long")))
    assert_error(run("generate", "-"), 2, "over 3 bytes")


def test_seeds_differ_unless_given(asked):
    seeds = set()
    for _ in range(3):
        run("generate", "hi")
        seeds.add(asked.how.sampling.seed)
    assert len(seeds) > 1
    run("generate", "hi", "--seed", "7")
    assert asked.how.sampling.seed == 7


# What join and generate print, with a node made of cardboard


class CardboardModel:
    name, digest = "toy", bytes(32)
    stats = {}  # noqa: RUF012 - a constant

    def __init__(self, pieces, failure=None):
        self._pieces, self._failure = pieces, failure
        self.last_stats = None
        self.prompts = []

    async def generate(self, prompt, **how):
        self.prompts.append(prompt)
        self.last_stats = GenerationStats(
            prompt_tokens=3, new_tokens=2, route=("a[0:2]",), wire="bf16", decode_s=0.5, **self.stats
        )
        for piece in self._pieces:
            yield piece
        if self._failure is not None:
            raise self._failure

    def render_chat(self, messages):
        return [len(messages)]

    @contextlib.asynccontextmanager
    async def conversation(self):
        yield self


class CardboardNode:
    """Obeys what commands.py uses of Node."""

    model_ = None
    listed = (SimpleNamespace(name="gemma3-270m"),)
    loading = None
    drained = False

    def __init__(self, config):
        self.config = config
        self.peer_id = PEER
        self.addrs = (Multiaddr.parse(ADDRESS), Multiaddr.parse(f"/ip4/192.0.2.7/tcp/4001/p2p/{PEER}"))
        type(self).drained = False

    async def __aenter__(self):
        return self

    async def __aexit__(self, *exc):
        pass

    async def models(self):
        return self.listed

    async def model(self, name):
        return self.model_

    async def serve(self, model, *, span, quant, dtype, device, kv, share_prefixes, progress, opening):
        opening("reading", 5_000_000, 10_000_000)
        for done in (1, 2):
            progress(done, 2)
        if self.loading is not None:
            await self.loading()
        served = SimpleNamespace(name=model, digest=bytes(32), label=f"{model}@00")
        return SimpleNamespace(model=served, start=0, end=2, quant="int8")

    async def drain(self):
        type(self).drained = True


PIECES = (
    Piece(text="Hel", token_id=1, logprob=-0.5),
    Piece(text="lo", token_id=2, logprob=-0.25, finish_reason="length"),
)


@pytest.fixture
def node(monkeypatch):
    kind = type("Node", (CardboardNode,), {"model_": CardboardModel(PIECES)})
    monkeypatch.setattr(commands, "Node", kind)
    return kind


def soon(number):
    """Deliver a signal once the loop has come round a few times."""

    async def send():
        for _ in range(5):
            await asyncio.sleep(0)
        signal.raise_signal(number)

    return send


def interrupt_when_ready(monkeypatch, number=signal.SIGINT):
    say_ready = commands._say_ready

    def say(*args):
        say_ready(*args)
        signal.raise_signal(number)

    monkeypatch.setattr(commands, "_say_ready", say)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_join_says_ready_then_drains_on_a_signal(node, monkeypatch, number):
    interrupt_when_ready(monkeypatch, number)
    before = signal.getsignal(number)
    code, out, err = run("join", "toy", "--serve", "0:2", "--listen", "/ip4/127.0.0.1/tcp/0")
    assert code == 0
    assert out == f"READY /ip4/192.0.2.7/tcp/4001/p2p/{PEER}\n"
    assert "reading: 5 MB/10 MB" in err
    assert "loading toy: 1/2 blocks\nloading toy: 2/2 blocks\n" in err
    assert "serving blocks 0:2 of toy@00, weights int8" in err
    assert "leaving the swarm" in err
    assert "\x1b" not in err + out
    assert node.drained
    assert signal.getsignal(number) is before


def test_join_json_is_one_object(node, monkeypatch):
    interrupt_when_ready(monkeypatch)
    code, out, _ = run("join", "toy", "--json")
    body = json.loads(out)
    assert code == 0
    assert body["peer_id"] == str(PEER)
    assert (body["model"], body["start"], body["end"], body["quant"]) == ("toy", 0, 2, "int8")
    assert body["ready"] in body["addrs"]


def test_join_nothing(node, monkeypatch):
    interrupt_when_ready(monkeypatch)
    code, out, err = run("-q", "join", "--serve", "none")
    assert (code, err) == (0, "")
    assert out.startswith("READY ")


def test_an_interrupt_while_loading_ends_it(node):
    async def load():
        await soon(signal.SIGINT)()
        await asyncio.Event().wait()

    node.loading = staticmethod(load)
    code, out, _ = run("join", "toy")
    assert (code, out) == (130, "")
    assert not node.drained


def test_an_error_while_loading_is_one_line(node):
    async def load():
        raise errors.ConfigError("span 0:99 is not inside toy: toy has 2 blocks: use --serve 0:2 or auto")

    node.loading = staticmethod(load)
    assert_error(run("join", "toy", "--serve", "0:99"), 2, "use --serve 0:2 or auto")


def test_several_models_must_be_told_apart(node):
    async def two(self):
        return [SimpleNamespace(name="b"), SimpleNamespace(name="a")]

    node.models = two
    assert_error(run("join"), 2, "several models", "a, b")


def test_generate_streams_text_and_keeps_stderr_apart(node):
    code, out, err = run("generate", "hi", "--stats", "--peer", ADDRESS)
    assert (code, out) == (0, "Hello\n")
    assert "a[0:2], wire bf16" in err
    assert "3 in, 2 out, 2.0 tokens/s" in err
    code, out, err = run("-q", "generate", "hi", "--peer", ADDRESS)
    assert (code, out, err) == (0, "Hello\n", "")


def test_generate_json(node):
    code, out, _ = run("generate", "hi", "--json", "--peer", ADDRESS)
    body = json.loads(out)
    assert code == 0
    assert (body["text"], body["token_ids"], body["finish_reason"]) == ("Hello", [1, 2], "length")
    assert body["stats"]["tokens_per_s"] == 2.0


def test_generate_json_with_log_probabilities(node):
    top = ((1, -0.1), (2, -2.5))
    node.model_ = CardboardModel([Piece(text="x", token_id=1, logprob=-0.1, finish_reason="stop", top_logprobs=top)])
    body = json.loads(run("generate", "hi", "--json", "--peer", ADDRESS)[1])
    assert body["top_logprobs"] == [[[1, -0.1], [2, -2.5]]]


def test_speculation_is_shown(node):
    node.model_.stats = {"traversals": 1, "drafted": 3, "accepted": 1}
    err = run("generate", "hi", "--stats", "--peer", ADDRESS)[2]
    assert "2.00 tokens per traversal, 1 of 3 guesses right" in err


def test_what_was_written_before_a_failure_stays(node):
    node.model_ = CardboardModel(PIECES[:1], errors.ServerFailed("nobody left"))
    code, out, err = run("generate", "hi", "--peer", ADDRESS)
    assert (code, out) == (1, "Hel\n")
    assert err.splitlines()[-1] == "error: nobody left"


def test_generate_without_a_swarm_says_that_it_runs_alone(node):
    code, out, err = run("generate", "hi")
    assert (code, out) == (0, "Hello\n")
    assert "no swarm found" in err
    assert "loading gemma3-270m: 2/2 blocks" in err


def test_an_empty_swarm_is_told_before_any_file_is_opened(node):
    async def never(self, name):
        raise AssertionError("a model was opened")

    node.listed, node.model = (), never
    for command in ("generate", "hi"), ("chat",):
        assert_error(run(*command, "--peer", ADDRESS), 3, "serves no model yet", "swarmnode join gemma3-270m")


def test_the_privacy_note_comes_once(node):
    public = f"/ip4/192.0.2.1/tcp/1/p2p/{PEER}"
    assert "can read the prompts" in run("generate", "hi", "--peer", public)[2]
    assert "can read the prompts" not in run("generate", "hi", "--peer", public)[2]
    assert "can read the prompts" not in run("generate", "hi", "--peer", ADDRESS)[2]


def test_chat_keeps_the_conversation(node, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n\nthree\n"))
    code, out, _ = run("chat", "--peer", ADDRESS, "--system", "be brief")
    assert (code, out) == (0, "Hello\nHello\n")
    assert node.model_.prompts == [[2], [4]]
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n"))
    node.model_.prompts.clear()
    assert run("chat", "--peer", ADDRESS, "--raw")[0] == 0
    assert node.model_.prompts == ["one\n"]


# The console


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_tables_are_plain_without_a_terminal_and_never_run_markup(monkeypatch):
    rows = [("[red]x[/red]", "1"), ("longer name", "22")]
    plain = io.StringIO()
    Console(out=plain).table(("name", "n"), rows)
    assert plain.getvalue() == "name          n\n[red]x[/red]  1\nlonger name   22\n"
    terminal = Terminal()
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    Console(out=terminal).table(("name", "n"), rows)
    assert "[red]x[/red]" in terminal.getvalue()
    assert "\x1b[" in terminal.getvalue()
    monkeypatch.setenv("NO_COLOR", "1")
    colourless = Terminal()
    Console(out=colourless).table(("name", "n"), rows)
    assert "\x1b" not in colourless.getvalue()


def test_progress_rewrites_a_terminal_line_and_is_sparse_elsewhere():
    terminal = Terminal()
    console = Console(err=terminal)
    console.progress("loading:", 1, 2, "blocks")
    console.note("something happened")
    console.progress("loading:", 2, 2, "blocks")
    assert terminal.getvalue() == ("\r\x1b[2Kloading: 1/2 blocks\nsomething happened\n\r\x1b[2Kloading: 2/2 blocks\n")
    plain = io.StringIO()
    for done in range(1, 1001):
        Console(err=plain).progress("loading:", done, 1000, "blocks")
    assert plain.getvalue().count("\n") == 10
    Console(err=plain).progress("nothing:", 0, 0)
    assert "nothing" not in plain.getvalue()


# The looking verbs, against a real node that only helps the DHT


@pytest.fixture
def dht_node(own_folders):
    """(address, process) of `swarmnode join --serve none`."""
    program = [sys.executable, "-c", "from swarmnode.cli import main; main()"]
    process = subprocess.Popen(
        [*program, "join", "--serve", "none", "--listen", "/ip4/127.0.0.1/tcp/0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        word, address = process.stdout.readline().split()
        assert word == "READY"
        yield address, process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc")
def test_a_dht_node_never_loads_torch(dht_node):
    _, process = dht_node
    assert "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text()


def test_a_dht_node_is_found_and_leaves_cleanly(dht_node):
    address, process = dht_node
    peer = address.rpartition("/")[2]
    code, out, _ = run("status", "--json")
    assert code == 0
    body = json.loads(out)
    assert [node["peer_id"] for node in body["local_nodes"]] == [peer]
    assert body["models"] == []
    code, out, _ = run("peers", "--peer", address, "--json")
    assert [row["peer_id"] for row in json.loads(out)] == [peer]
    assert peer in run("peers")[1]
    code, out, _ = run("models", "--json")
    assert (code, json.loads(out)) == (0, [])
    code, out, _ = run("ping", address, "-c", "2", "--json")
    assert 0 < json.loads(out)["min_s"] < 5
    assert len(run("ping", address, "-c", "2")[1].splitlines()) == 2
    assert run("id")[1].strip() == peer
    wrong = f"{address.rpartition('/')[0]}/{PEER}"
    assert_error(run("ping", wrong), 1, str(PEER))
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 0


def test_peers_v_shows_the_connections_of_the_running_node(dht_node, own_folders):
    address, _ = dht_node
    peer = address.rpartition("/")[2]
    (runtime,) = (own_folders / "state").glob("node-*.json")
    assert runtime.stat().st_mode & 0o777 == 0o600
    code, out, _ = run("peers", "-v", "--json")
    (node,) = json.loads(out)["nodes"]
    assert (code, node["peer_id"], node["connections"]) == (0, peer, [])
    assert node["metrics"]["connections"] == 1  # the one that asks
    code, out, _ = run("peers", "-v")  # the connection that asked before has ended
    assert code == 0
    lines = out.splitlines()
    assert lines[0] == f"node {peer}: 0 connections"
    assert "ended lately" in lines
    assert "the peer closed the connection" in out
    code, out, _ = run("peers", "-v", "--peer", address, "--json")
    (own,) = json.loads(out)["nodes"]
    (row,) = own["connections"]
    assert own["peer_id"] != peer
    assert (code, row["peer_id"], row["direction"], row["relayed"]) == (0, peer, "out", False)
    assert row["rate_in"] >= 0
    assert row["rtt_min_s"] > 0
    code, out, _ = run("peers", "-v", "--peer", address)
    head, row = out.splitlines()[1:3]
    assert head.split()[:3] == ["peer", "address", "path"]
    assert row.split()[0] == peer[-8:]
    assert "direct" in row
    (local,) = json.loads(run("status", "--json")[1])["local_nodes"]
    assert local["metrics"]["connections_in"] >= 2
    assert set(local["metrics"]["total"]["classes"]) == {"control", "decode", "bulk"}


def test_a_node_that_does_not_answer_is_said(dht_node, own_folders):
    (runtime,) = (own_folders / "state").glob("node-*.json")
    runtime.write_text(json.dumps(json.loads(runtime.read_text()) | {"report_key": "00" * 32}))
    code, out, err = run("peers", "-v", "--json")
    assert (code, json.loads(out)) == (1, {"nodes": []})
    assert "does not answer" in err
    (local,) = json.loads(run("status", "--json")[1])["local_nodes"]
    assert local["metrics"] is None


@pytest.fixture
def trace_dir(own_folders, monkeypatch):
    monkeypatch.setenv("SWARMNODE_TRACE_DIR", str(own_folders / "traces"))
    return own_folders / "traces"


def test_a_traced_node_leaves_traces_that_replay(trace_dir, dht_node):
    address, process = dht_node
    assert run("ping", address, "-c", "2")[0] == 0
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 0
    ours, theirs = sorted(trace_dir.glob("trace-*.jsonl"), key=lambda path: "-in-" in path.name)
    for path in (ours, theirs):
        code, out, _ = run("trace", str(path))
        assert code == 0
        assert out.startswith("same to the end: ")
        assert "does not reach" not in out


TRACE_HEAD = '{"file_schema": "urn:swarmnode:trace:1", "vantage_point": {"type": "client"}}'


def test_trace_says_where_it_departs(tmp_path):
    path = tmp_path / "trace.jsonl"
    assert_error(run("trace", str(path)), 2, "cannot read the trace")
    path.write_text("nonsense\n")
    assert_error(run("trace", str(path)), 2, "line 1: not JSON")
    path.write_text("x" * (3 << 20))
    assert_error(run("trace", str(path)), 2, "line 1: a line of")
    started = '{"time": 0, "name": "yamux:session_started", "data": {"client": true, "rules": 5}}'
    path.write_text(f"{TRACE_HEAD}\n{started}\n")
    code, out, _ = run("trace", str(path))
    assert code == 1
    assert out.splitlines()[1:3] == ["line      2, yamux:session_started", 'expected  {"rules":5}']
    code, out, _ = run("trace", str(path), "--json")
    assert (code, json.loads(out)["departure"]["line"]) == (1, 2)
    path.write_text(f"{TRACE_HEAD}\n")
    code, out, _ = run("trace", str(path))
    assert (code, out) == (
        0,
        "same to the end: 0 records, 0 streams, 0 frames in, 0 out; the trace does not reach the end\n",
    )
    assert json.loads(run("trace", str(path), "--json")[1])["departure"] is None


def test_id_makes_the_key_once(own_folders):
    code, out, _ = run("id", "--json")
    body = json.loads(out)
    assert code == 0
    assert Path(body["path"]) == own_folders / "data" / "node.key"
    assert run("id")[1].strip() == body["peer_id"]
    other = own_folders / "other.key"
    assert run("id", "--identity", str(other))[1].strip() != body["peer_id"]
    other.write_bytes(b"junk")
    assert_error(run("id", "--identity", str(other)), 2, "not a libp2p private key")


# This machine's figures


def test_bench_measures_a_model(monkeypatch):
    import torch
    from helpers.tiny_models import RandomCheckpoint, make_config
    from swarmnode.kernels import bench, measure

    monkeypatch.setenv("OMP_NUM_THREADS", "9")  # torch reads it when it is loaded: here it is, long ago
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    monkeypatch.setattr(measure, "_TIMING_BUDGET_S", 0.0)
    monkeypatch.setattr(bench, "read_bandwidth", lambda: measure.read_bandwidth(1 << 20))
    monkeypatch.setattr(bench, "matmul_rate", lambda dtype: measure.matmul_rate(dtype, 64))
    monkeypatch.setattr("swarmnode.kernels.loading.checkpoint.open_checkpoint", lambda *_, **__: tiny)
    tiny = RandomCheckpoint(make_config(num_blocks=6))
    code, out, _ = run("bench", "toy", "--threads", "1", "--quant", "none", "--quant", "int8", "--json")
    body = json.loads(out)
    assert (code, os.environ["OMP_NUM_THREADS"], body["limits"]["threads"]) == (0, "1", torch.get_num_threads())
    assert [found["quant"] for found in body["blocks"]] == ["none", "int8"]
    for found in body["blocks"]:
        assert found["bytes"] / found["decode_s"] == pytest.approx(
            found["decode_share"] * body["limits"]["bytes_per_s"]
        )
    assert body["head"]["bytes"] == 64 * 128 * 4  # small: kept in fp32
    code, out, _ = run("bench", "toy", "--quant", "int8")
    assert code == 0
    assert out.splitlines()[1] == "toy, one of its 6 blocks:"
    assert out.splitlines()[3].startswith("int8 ")


def test_bench_names_what_it_cannot_measure(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    assert_error(run("bench", "/no/such/model"), 1, "is no model")


# A route and a status made of routing's own data


def test_route_and_status_show_every_term(monkeypatch):
    from swarmnode.routing.announce import Announcement, State
    from swarmnode.routing.metrics import Metrics
    from swarmnode.routing.planner import PlanRequest, plan
    from swarmnode.routing.swarm import SwarmView

    announcement = Announcement(
        model="toy",
        digest=bytes(32),
        peer=PEER,
        addrs=(),
        start=0,
        end=2,
        num_blocks=3,
        state=State.ONLINE,
        compute_class=bytes(8),
        prefill_s=0.1,
        decode_s=0.01,
        kv_free=64,
        public_name="kitchen",
    )
    swarm = SwarmView.build("toy", bytes(32), 3, [announcement])
    chain = plan(PlanRequest(end=2), swarm, Metrics(), now=0.0)

    class Node(CardboardNode):
        async def model(self, name):
            async def route(*, tokens):
                return chain

            return SimpleNamespace(name="toy", digest=bytes(32), route=route)

        async def models(self):
            return [SimpleNamespace(name="toy", digest=bytes(32))]

        async def view_of(self, listed):
            return swarm

        async def status(self):
            return SimpleNamespace(known_nodes=4)

    @contextlib.asynccontextmanager
    async def client(config, console):
        yield Node(config)

    monkeypatch.setattr(reports, "client", client)
    code, out, _ = run("route", "toy", "--peer", ADDRESS)
    assert code == 0
    head, first, back, total = out.splitlines()
    assert [word for word in head.split() if word != "ms"] == [
        *("server", "blocks", "network", "transfer", "overhead", "queue", "compute", "risk", "sum"),
    ]
    assert first.split()[:3] == [PEER.short, "0:2", "50.00"]
    assert "20.00" in first
    assert back.startswith("back")
    assert "ms a step predicted" in total
    body = json.loads(run("route", "toy", "--peer", ADDRESS, "--json")[1])
    assert body["hops"][0]["terms_s"]["compute"] == pytest.approx(0.02)
    code, out, _ = run("status", "--peer", ADDRESS)
    assert "blocks 2:3 missing" in out
    assert "kitchen" in out
    body = json.loads(run("status", "--peer", ADDRESS, "--json")[1])
    assert body["models"][0]["coverage"] == [1, 1, 0]
    assert body["models"][0]["servers"][0]["public_name"] == "kitchen"


# Invites


def test_an_invite_of_the_addresses_given_and_back():
    code, out, err = run("invite", "--peer", ADDRESS, "--swarm", "garage")
    assert code == 0
    assert "this machine only" in err
    word = out.strip()
    made = Invite.parse(word)
    assert (made.swarm, [str(addr) for addr in made.addrs]) == ("garage", [ADDRESS])
    code, out, _ = run("invite", "--peer", word, "--json")
    assert json.loads(out) == {"invite": word, "swarm": "garage", "addrs": [ADDRESS]}


def test_an_invite_of_the_node_on_this_machine(own_folders):
    addrs = [Multiaddr.parse(ADDRESS), Multiaddr.parse(ADDRESS.replace("127.0.0.1", "192.0.2.9"))]
    file = RuntimeFile(own_folders / "state", PEER, "main", addrs)
    code, out, err = run("invite")
    assert (code, err) == (0, "")
    assert Invite.parse(out.strip()).addrs == (addrs[1],)
    file.remove()
    assert_error(run("invite"), 2, "start swarmnode join")


def test_invites_of_two_swarms_do_not_go_together():
    words = [run("invite", "--peer", ADDRESS, "--swarm", swarm)[1].strip() for swarm in ("a", "b")]
    assert_error(run("status", "--peer", words[0], "--peer", words[1]), 2, "several swarms: a, b")
    assert_error(run("status", "--peer", words[0], "--swarm", "c"), 2, "several swarms: a, c")
    assert_error(run("status", "--peer", words[0][:-1]), 2, "copy it again")
