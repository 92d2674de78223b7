"""Make the stored runs of this version: ``python tests/stored/make.py`` in a checkout of the release.

Two archives in ``tests/stored/VERSION``: ``finished.tar.xz``, every stage done, and ``halfway.tar.xz``, killed in the
middle of phase1 after a checkpoint. What no reader opens again (text, finished weights, TensorBoard) stays out.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).parent
LEFT_OUT = (
    "documents*",
    "t*-0*.txt",
    "events.out.*",
    "*.diff",
    "*.html",
    "log.txt",
    "*lock",
    "model",
    "*.tries",
    "seeds",
)
LEFT_OUT_OF_FINISHED = ("*.safetensors", "*.hdf5", "*predictions.json")


def main() -> None:
    target = HERE / metadata.version("bert-slurm-pipeline")
    target.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        data = write_data(Path(folder) / "data")
        for name in ("finished", "halfway"):
            run = Path(folder) / name
            words = ["--recipe", HERE / "stored.toml", "--cluster", "local", "--run", run, "--data", data]
            command = [sys.executable, "-m", "pipeline.submit", *map(str, words), "--processes", "1"]
            process = subprocess.Popen(command, cwd=HERE.parents[1], start_new_session=True)
            checkpoint = run / "stages/phase1/attempts/0001/step-00000004/manifest.json"
            while process.poll() is None and (name == "finished" or not checkpoint.exists()):
                time.sleep(0.01)
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            assert process.wait() == (0 if name == "finished" else -signal.SIGKILL), name
            pack(run, target / f"{name}.tar.xz", whole=name == "halfway")


def write_data(folder: Path) -> Path:
    """Documents and task files of made-up sentences, the same ones always."""
    folder.mkdir()
    draw = random.Random(1)
    letters = ["".join(draw.choices("abcdefghijklmnop", k=draw.randint(2, 6))) for _ in range(60)]

    def sentence() -> str:
        return " ".join(draw.choices(letters, k=draw.randint(4, 9))).capitalize() + "."

    documents = [{"text": "\n\n".join(" ".join(sentence() for _ in range(4)) for _ in range(4))} for _ in range(40)]
    (folder / "text.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    paragraphs = []
    for number in range(8):
        context = sentence()
        answer = {"text": context.split()[1], "answer_start": len(context.split()[0]) + 1}
        question = {"id": str(number), "question": sentence(), "answers": [answer]}
        paragraphs.append({"context": context, "qas": [question]})
    (folder / "qa.json").write_text(json.dumps({"version": "1.1", "data": [{"title": "", "paragraphs": paragraphs}]}))
    pairs = [f"{number % 2}\t{number}\t{number}\t{sentence()}\t{sentence()}\n" for number in range(16)]
    (folder / "pairs.tsv").write_text("Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n" + "".join(pairs))
    (folder / "sentiment.tsv").write_text("sentence\tlabel\n" + "".join(f"{sentence()}\t{n % 2}\n" for n in range(16)))
    return folder


def pack(run: Path, archive: Path, *, whole: bool) -> None:
    def kept(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
        path = Path(entry.name)
        if any(path.match(pattern) for pattern in (*LEFT_OUT, *(() if whole else LEFT_OUT_OF_FINISHED))):
            return None
        entry.uid = entry.gid = entry.mtime = 0
        entry.uname = entry.gname = ""
        return entry

    with tarfile.open(archive, "w:xz") as tar:
        tar.add(run, arcname=".", filter=kept)


if __name__ == "__main__":
    main()
