"""Data, checkpoints and an environment that are missing, damaged or of something else."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable

from tests.planted import Planted
from tests.refusals.cases import Case, Place

EASY = "easy_text_document"
LOAD = "--load {checkpoints}"


def cut(name: str, keep: float) -> Callable[[Place], None]:
    """Keep a part of a file of the data."""

    def spoil(place: Place) -> None:
        path = place.data / name
        os.truncate(path, int(path.stat().st_size * keep))

    return spoil


def write(name: str, content: bytes) -> Callable[[Place], None]:
    """Put other bytes into a file of the data."""
    return lambda place: _ignore((place.data / name).write_bytes(content))


def _ignore(_: object) -> None:
    return None


def other_tokens(place: Place) -> None:
    """The index of one dataset beside the tokens of another."""
    shutil.copy(place.data / f"{EASY}.bin", place.data / "noise_text_document.bin")


def domains(**record: object) -> Callable[[Place], None]:
    """A `domains.json` for the easy dataset."""
    tokenizer = {"type": "NullTokenizer", "model": "other", "sha256": "0" * 64, "vocab_size": 61}
    easy = {"prefix": EASY, "documents": 200, "tokens": 1, "max_token_id": 60} | record

    def spoil(place: Place) -> None:
        content = {"version": 1, "tokenizer": tokenizer, "domains": {"plain": easy}}
        (place.data / "domains.json").write_text(json.dumps(content))
        (place.empty / "mine.model").write_bytes(b"mine")

    return spoil


def altered_data(place: Place) -> None:
    """The data of a run that is to go on has become other data of the same size."""
    path = place.data / f"{EASY}.bin"
    path.write_bytes(bytes(reversed(path.read_bytes())))


def no_metadata(*iterations: int) -> Callable[[Place], None]:
    def spoil(place: Place) -> None:
        for iteration in iterations:
            (place.checkpoints / f"iter_{iteration:07d}" / "metadata.json").unlink()

    return spoil


def lost_shard(place: Place) -> None:
    next((place.checkpoints / "iter_0000004").glob("*.distcp")).unlink()


def track(text: str) -> Callable[[Place], None]:
    return lambda place: _ignore(
        (place.checkpoints / "latest_checkpointed_iteration.txt").write_text(text)
    )


def planted_index(place: Place) -> None:
    index = place.checkpoints / "iter_0000004" / ".metadata"
    index.write_bytes(pickle.dumps(Planted(place.empty / "planted")))


def damaged_index(place: Place) -> None:
    index = place.checkpoints / "iter_0000004" / ".metadata"
    index.write_bytes(b"\x80\x04garbage")


def file_for_folder(place: Place) -> None:
    (place.empty / "file").write_text("")


DATA = (
    Case(
        "no dataset",
        "--data-path {data}/esay_text_document",
        "esay_text_document.idx is missing. A data path is the common prefix of a .bin and an "
        ".idx file, as tools/preprocess_data.py writes them. {data} has easy_text_document",
    ),
    Case("no folder", "--data-path /nowhere/easy", "there is no folder /nowhere"),
    Case("empty folder", "--data-path {empty}/easy", "easy.idx is missing"),
    Case(
        "suffix given",
        "--data-path {data}/easy_text_document.bin",
        "give the prefix without .bin",
    ),
    Case("no data", "--data-path", "no data: give --data-path PREFIX"),
    Case(
        "no list of data",
        "--data-args-path /nowhere/blend.txt",
        "--data-args-path /nowhere/blend.txt: there is no such file",
    ),
    Case(
        "weight without data",
        "--data-path 0.5 {data}/easy_text_document 0.5",
        "data path 0.5 is a weight without data",
    ),
    Case(
        "weight of nothing",
        "--data-path 0 {data}/easy_text_document 1 {data}/noise_text_document",
        "{data}/easy_text_document has the weight 0, which must be above 0",
    ),
    Case("four shares", "--split 90,10,5,5", "give up to three shares"),
    Case("shares in words", "--split most,some", "give up to three shares"),
    Case("no training data", "--split 0,50,50", "leaves nothing to train on"),
    Case(
        "share without a document",
        "--split 99.9,0.05,0.05",
        "leaves no document of {data}/easy_text_document for validation: it has 200",
    ),
    Case("tokens cut off", "", "is cut off: it has 14,303 bytes", spoil=cut(f"{EASY}.bin", 0.5)),
    Case(
        "tokens of another index",
        "",
        "noise_text_document.bin belongs to another index: it has 28,606 bytes",
        spoil=other_tokens,
    ),
    Case("index cut off", "", "and its header tells of", spoil=cut(f"{EASY}.idx", 0.5)),
    Case("index that is none", "", "is no index", spoil=write(f"{EASY}.idx", b"PK" * 99)),
    Case("empty index", "", "is no index", spoil=cut(f"{EASY}.idx", 0)),
    Case(
        "no tokenizer",
        "--tokenizer-type SentencePieceTokenizer --tokenizer-model /nowhere/bpe.model",
        "--tokenizer-model /nowhere/bpe.model: there is no such file",
    ),
    Case(
        "other tokenizer",
        "--tokenizer-model {empty}/mine.model",
        "was made with other, and --tokenizer-model {empty}/mine.model is another model",
        spoil=domains(),
    ),
    Case(
        "small vocabulary",
        "--vocab-size 9",
        "holds token id 60, but the model's vocabulary has 16 entries: the data was made with "
        "another tokenizer",
    ),
    Case("damaged domains.json", "", "not JSON", spoil=write("domains.json", b"{")),
    Case(
        "incomplete domains.json",
        "",
        "domains.json: tokenizer is missing",
        spoil=write("domains.json", b'{"version": 1}'),
    ),
    Case(
        "negative count in domains.json",
        "",
        "domains.plain.documents is negative (-1)",
        spoil=domains(documents=-1),
    ),
)

SAVE = "--save {empty} --save-interval 2"

CHECKPOINTS = (
    Case(
        "other model",
        f"{LOAD} --num-layers 3 --hidden-size 64",
        "is a checkpoint of another model: --num-layers 4 there, 3 here; --hidden-size 32 there, "
        "64 here",
    ),
    Case(
        "other length of training",
        f"{LOAD} --train-iters 9",
        "was written under another schedule: --lr-decay-iters 32 there, 72 here",
    ),
    Case("other learning rate", f"{LOAD} --lr 1e-3", "--lr 0.01 there, 0.001 here"),
    Case(
        "data altered since",
        LOAD,
        "{data}/easy_text_document: not what {checkpoints}/iter_0000004 was trained on",
        spoil=altered_data,
    ),
    Case(
        "no such iteration",
        f"{LOAD} --ckpt-step 3",
        "has no such checkpoint; it has those of iterations 2, 4",
    ),
    Case(
        "incomplete, named",
        f"{LOAD} --ckpt-step 4",
        "is incomplete: it has no metadata.json",
        spoil=no_metadata(4),
    ),
    Case("incomplete, of another run", LOAD, "add --ckpt-step 2", spoil=no_metadata(4)),
    Case("none complete", LOAD, "there is no complete checkpoint", spoil=no_metadata(2, 4)),
    Case("lost shard", LOAD, "__0_0.distcp is missing", spoil=lost_shard),
    Case("tracker of what is gone", LOAD, "iteration 7, which is not there", spoil=track("7")),
    Case("tracker without a number", LOAD, "its tracker names none", spoil=track("four")),
    Case(
        "index that would run code",
        LOAD,
        "it names posix.mkdir, which no index of a checkpoint needs",
        spoil=planted_index,
    ),
    Case("damaged index", LOAD, "is damaged", spoil=damaged_index),
    Case(
        "none to go on from",
        "--load /nowhere --exit-on-missing-checkpoint",
        "--load /nowhere holds no checkpoint",
    ),
    Case(
        "none to begin with",
        "--pretrained-checkpoint /nowhere --load {empty}",
        "--pretrained-checkpoint /nowhere holds no checkpoint",
    ),
    Case(
        "saving into a file",
        "--save {empty}/file --save-interval 2",
        "{empty}/file is no folder",
        spoil=file_for_folder,
    ),
    Case(
        "saving below a file",
        "--save {empty}/file/run --save-interval 2",
        "{empty}/file is no folder",
        spoil=file_for_folder,
    ),
    Case(
        "log in a file",
        "--log-dir {empty}/file",
        "{empty}/file is no folder",
        spoil=file_for_folder,
    ),
    Case(
        "TensorBoard in a file",
        "--tensorboard-dir {empty}/file",
        "{empty}/file is no folder",
        spoil=file_for_folder,
    ),
    Case(
        "data indexes in a file",
        "--data-cache-path {empty}/file",
        "{empty}/file is no folder",
        spoil=file_for_folder,
    ),
    Case("saving at no time", "--save {empty}", "--save DIR needs --save-interval"),
    Case("keeping none", f"{SAVE} --keep-last 0", "--keep-last must be 1 or more, not 0"),
    Case("keeping some of all", f"{SAVE} --keep-every 10", "add --keep-last"),
    Case("keeping what is not saved", "--keep-last 3", "add --save DIR"),
    Case(
        "two that delete",
        f"{SAVE} --keep-last 3 --save-retain-interval 10",
        "both delete checkpoints: drop one",
    ),
    Case(
        "status of a signal",
        "--exit-code-when-unfinished 137",
        "must be in [0, 125], not 137",
    ),
    Case(
        "async saving of another format",
        f"{SAVE} --async-save --ckpt-format torch",
        "--async-save cannot write --ckpt-format torch",
    ),
    Case(
        "async saving that is none",
        f"{SAVE} --async-save --async-strategy mcore",
        "--async-save needs --use-persistent-ckpt-worker",
    ),
    Case(
        "async saving without its package",
        f"{SAVE} --async-save --use-persistent-ckpt-worker",
        "install it, or use --async-strategy mcore",
    ),
)

_NO_LAUNCHER = dict.fromkeys(("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"))
_SRUN = {
    "SLURM_PROCID": "0",
    "SLURM_NTASKS": "2",
    "SLURM_LOCALID": "0",
    "SLURM_NNODES": "2",
    "SLURM_JOB_ID": "7",
}

ENVIRONMENT = (
    Case("half of torchrun", "", "MASTER_PORT is not", environment={"MASTER_PORT": None}),
    Case("rank without a world", "", "WORLD_SIZE is not", environment={"WORLD_SIZE": None}),
    Case("rank in words", "", "RANK=0.5 is no number", environment={"RANK": "0.5"}),
    Case(
        "rank beyond the world",
        "",
        "RANK=3 is none of the ranks 0 to 0",
        environment={"RANK": "3"},
    ),
    Case("port in words", "", "MASTER_PORT=http is no number", environment={"MASTER_PORT": "http"}),
    Case(
        "SLURM without a master",
        "",
        "several SLURM nodes, but no master address",
        environment={**_NO_LAUNCHER, **_SRUN},
    ),
    Case("no GPU", "--device cuda", "torch sees no CUDA device"),
    Case("unknown device", "--device tpu", "choose one of auto, cuda, cpu"),
    Case("no argument file", "@/nowhere/run.args", "'/nowhere/run.args'"),
    Case(
        "unknown kernels",
        "",
        "MEGATRON_RW_KERNELS=fast: choose one of",
        environment={"MEGATRON_RW_KERNELS": "fast"},
    ),
    Case(
        "CUDA kernels without a GPU",
        "--reweight-strategy linupper --reweight-kernels cuda",
        "the CUDA kernels need a GPU",
        # Tests of the kernels name an emulated library.
        environment={"MEGATRON_RW_CUDA_LIBRARY": None},
    ),
    Case(
        "Triton kernels without a GPU",
        "--reweight-strategy linupper --reweight-kernels triton",
        "the Triton kernels need a GPU",
        environment={"TRITON_INTERPRET": None},
    ),
)
