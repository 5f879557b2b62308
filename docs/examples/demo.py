"""What `make demo` runs: a model split over three processes writes on while one of them is killed.

Starts a small meeting node, three servers with a third of Gemma 3 270M each and a replica of the middle one, all on
this machine; generates 64 tokens; generates them again and kills the middle server that is at work with SIGKILL half
way; compares the texts. Everything is an ordinary `swarmnode` command, shown before it runs. Exit code 0 means that
all of it went as it should. Needs nothing but the installed package and its `demo` extra.
"""

import contextlib
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

MODEL = "gemma3-270m"
PROMPT = "To bake bread you need"
TOKENS = 64
READY_S, END_S = 180, 30
SWARMNODE = Path(sys.executable).with_name("swarmnode")
STARTED = time.monotonic()


class DemoFailed(Exception):
    """Something was not as it should be."""


def say(text: str = "") -> None:
    print(text, flush=True)


def environment(folder: Path) -> dict[str, str]:
    """A user of their own, whose keys and settings live in `folder`; converted weights stay in the usual cache."""
    settings = folder / "config.toml"
    settings.touch()
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("SWARMNODE_")}
    return inherited | {
        "SWARMNODE_CONFIG": str(settings),
        "SWARMNODE_DATA_DIR": str(folder / "data"),
        "SWARMNODE_STATE_DIR": str(folder / "state"),
        # four processes share this machine's cores: one thread each, and none that spins while it waits
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "PYTHONSAFEPATH": "1",
        "HF_HUB_OFFLINE": "1",
    }


class Server:
    """One `swarmnode join` process."""

    def __init__(self, name: str, arguments: list[str], folder: Path, env: dict[str, str]) -> None:
        command = ["join", *arguments, "--listen", "/ip4/127.0.0.1/tcp/0", "--public-name", name]
        say(f"$ swarmnode {' '.join(arg if len(arg) < 40 else arg[:24] + '…' + arg[-6:] for arg in command)} &")
        self.name = name
        self.log = folder / f"{name}.log"
        with self.log.open("wb") as log:
            self.child = subprocess.Popen(
                [SWARMNODE, *command], env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log
            )

    def ready(self) -> str:
        """Wait for its READY line; the address it names."""
        if select.select([self.child.stdout], [], [], READY_S)[0]:
            words = self.child.stdout.readline().decode().split()
            if words[:1] == ["READY"]:
                return words[1]
        raise DemoFailed(f"{self.name} did not get ready:\n{self.log.read_text()[-2000:]}")

    def cpu_s(self) -> float:
        """Processor time it has used: who is working on our text, and who stands by."""
        with contextlib.suppress(FileNotFoundError):
            fields = Path(f"/proc/{self.child.pid}/stat").read_text().rpartition(")")[2].split()
            return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        clock = subprocess.check_output(["ps", "-o", "time=", "-p", str(self.child.pid)], text=True)  # macOS
        return sum(float(part) * 60**power for power, part in enumerate(reversed(clock.strip().split(":"))))

    def kill(self) -> None:
        self.child.kill()
        self.child.wait()

    def leave(self) -> None:
        """Ctrl-C: it drains, says goodbye and ends with exit code 0."""
        self.child.send_signal(signal.SIGINT)


@dataclass
class Run:
    """One generation."""

    text: str
    stats: str

    def number(self, pattern: str) -> float:
        found = re.search(pattern, self.stats)
        return float(found[1]) if found else 0.0


def generate(peer: str, env: dict[str, str], on_half: tuple[int, list[Server]] | None = None) -> Run:
    """Stream a generation to the screen. `on_half`: after so many bytes, kill the busiest of these servers."""
    say(f'\n$ swarmnode generate "{PROMPT}" --max-new-tokens {TOKENS} --stats --wire bf16 --peer …{peer[-6:]}')
    command = [
        SWARMNODE,
        "generate",
        PROMPT,
        "--max-new-tokens",
        str(TOKENS),
        "--stats",
        "--wire",
        "bf16",
        "--peer",
        peer,
    ]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    before = {server: server.cpu_s() for server in on_half[1]} if on_half else {}
    text = b""
    with subprocess.Popen(command, env=env, **pipes) as child:
        while part := child.stdout.read1():
            if not text:
                began = time.monotonic() - STARTED
            text += part
            sys.stdout.buffer.write(part)
            sys.stdout.flush()
            if on_half and before and len(text) >= on_half[0]:
                victim = max(before, key=lambda server: server.cpu_s() - before[server])
                victim.kill()
                before.clear()
                sys.stdout.write(f" [kill -9 {victim.name}] ")
        stats = child.stderr.read().decode()
    if child.returncode != 0 or not text:
        raise DemoFailed(f"generate ended with exit code {child.returncode}:\n{stats}")
    stats = "".join(line for line in stats.splitlines(keepends=True) if not line.startswith("loading"))
    say(stats + ("" if on_half else f"(first token {began:.0f} s after this demo began)"))
    return Run(text.decode().rstrip("\n"), stats)


def demo(folder: Path, servers: list[Server]) -> None:
    env = environment(folder)
    say("# Any node is an entrance to the swarm. This one serves no blocks and never loads torch.")
    servers.append(Server("door", ["--serve", "none"], folder, env))
    peer = servers[0].ready()
    say(f"\n# Three servers share the 18 blocks of {MODEL}; a fourth can stand in for the middle one.")
    spans = {"first": "0:6", "middle": "6:12", "last": "12:18", "replica": "6:12"}
    for name, span in spans.items():
        servers.append(Server(name, [MODEL, "--serve", span, "--peer", peer], folder, env))
    for server in servers[1:]:
        server.ready()
    say(f"ready after {time.monotonic() - STARTED:.0f} s")

    undisturbed = generate(peer, env)

    say("\n# Again; half way, the middle server that is at work dies.")
    middle = [server for server in servers if server.name in ("middle", "replica")]
    disturbed = generate(peer, env, (len(undisturbed.text.encode()) // 2, middle))
    say(f"$ swarmnode route {MODEL} --peer …{peer[-6:]}")
    say(subprocess.check_output([SWARMNODE, "route", MODEL, "--peer", peer], env=env, text=True))

    if disturbed.text != undisturbed.text:
        raise DemoFailed("the text differs from the undisturbed one")
    if disturbed.number(r"repairs +(\d+)") < 1:
        raise DemoFailed("the server that was killed was not the one in use")
    gap = r"gap ([0-9.]+)"
    say(
        f"The same {TOKENS} tokens both times. The longest wait for a token was {disturbed.number(gap):.0f} ms with the"
        f" kill, {undisturbed.number(gap):.0f} ms without."
    )


def stop(servers: list[Server]) -> None:
    """Let every process leave the swarm; any that does not end well is a failure."""
    living = [server for server in servers if server.child.poll() is None]
    for server in living:
        server.leave()
    for server in living:
        try:
            code = server.child.wait(END_S)
        except subprocess.TimeoutExpired:
            server.kill()
            raise DemoFailed(f"{server.name} did not leave within {END_S} s") from None
        if code != 0:
            raise DemoFailed(f"{server.name} ended with exit code {code}:\n{server.log.read_text()[-2000:]}")


def main() -> int:
    servers: list[Server] = []
    with tempfile.TemporaryDirectory(prefix="swarmnode-demo-") as folder:
        try:
            demo(Path(folder), servers)
            stop(servers)
        except DemoFailed as failure:
            print(f"\ndemo failed: {failure}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            return 130
        finally:
            for server in servers:
                server.kill()
    say(f"All processes left cleanly; the whole demo took {time.monotonic() - STARTED:.0f} s.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
