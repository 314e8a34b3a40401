"""From raw parallel text to fairseq's binarized format, once, into a cache.

Moses tokenization, one byte-pair encoding for both languages (Sennrich et al. 2016), and ``fairseq-preprocess`` with a
joined dictionary: what the translation papers do, so that their binarized data and ours are read by the same code.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import tempfile
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from recipes.translation.quiet_fairseq import fairseq_cli, sacremoses  # isort: skip
from fairseq import options
from lightning.fabric.utilities.rank_zero import rank_zero_info
from subword_nmt.apply_bpe import BPE
from subword_nmt.learn_bpe import learn_bpe

FORMAT = 1
"""Counts changes of what is written, so that older caches are not read."""


@dataclass(frozen=True)
class RawText:
    """Text in files such as ``train.en.gz`` and ``train.de.gz``, one sentence a line, and what is made of it.

    Args:
        train: name of the training files, without language and ``.gz``; they may also be uncompressed.
        valid: likewise for validation.
        test: likewise for the test.
        merges: operations of the byte-pair encoding, learned on both languages of the training text.
        cache: folder for the results, one sub-folder for each text and setting; ``~`` is the home.

    Example:
        >>> RawText(test="test2016").binarize("multi30k", "en", "de")
        PosixPath('/home/me/.cache/lightning-slowmo/en-de-1c0a3f4b5d6e7f80')
    """

    train: str = "train"
    valid: str = "valid"
    test: str = "test"
    merges: int = 6000
    cache: str = "~/.cache/lightning-slowmo"

    def __post_init__(self) -> None:
        if isinstance(self.merges, bool) or not isinstance(self.merges, int) or self.merges < 1:
            raise ValueError(f"merges must be a whole number of at least 1, got {self.merges!r}.")

    def files(self, root: str | Path, source: str, target: str) -> dict[str, Path]:
        """The six files, by ``<split>.<language>``.

        Raises:
            FileNotFoundError: if some are missing; names them.
        """
        found, missing = {}, []
        for split in ("train", "valid", "test"):
            for language in (source, target):
                name = f"{getattr(self, split)}.{language}"
                path = next((p for p in (Path(root, name + ".gz"), Path(root, name)) if p.is_file()), None)
                if path is None:
                    missing.append(name + ".gz")
                else:
                    found[f"{split}.{language}"] = path
        if missing:
            raise FileNotFoundError(
                f"No {', '.join(missing)} in {Path(root).absolute()}. Multi30k's text is in data/task1/raw of the "
                "repository multi30k/dataset on GitHub; set data.root to its folder, and names that differ as "
                "data.text.train, data.text.valid and data.text.test. The files may be compressed (.gz) or not."
            )
        return found

    def folder(self, root: str | Path, source: str, target: str) -> Path:
        """Where the binarized data are or will be; the name tells different text and settings apart."""
        digest = hashlib.sha256(json.dumps([FORMAT, source, target, self.merges]).encode())
        for name, path in sorted(self.files(root, source, target).items()):
            digest.update(name.encode() + hashlib.sha256(path.read_bytes()).digest())
        return Path(self.cache).expanduser().absolute() / f"{source}-{target}-{digest.hexdigest()[:16]}"

    def binarize(self, root: str | Path, source: str, target: str) -> Path:
        """Prepare the data unless the cache has them. Several processes may do so at the same time.

        Args:
            root: folder of the raw files.
            source: language to translate from, the ending of its files.
            target: language to translate into.

        Returns:
            A folder as ``fairseq-preprocess`` writes it, beside which the raw validation and test text is kept, for
            BLEU is measured against that.
        """
        folder = self.folder(root, source, target)
        if folder.is_dir():
            return folder
        rank_zero_info(f"Tokenizing and binarizing the text of {root} into {folder}, once.")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".unfinished-") as unfinished:
            made = self._make(self.files(root, source, target), Path(unfinished), source, target)
            try:
                made.rename(folder)
            except OSError:
                if not folder.is_dir():  # else another process was faster, with the same result
                    raise
        return folder

    def _make(self, files: dict[str, Path], folder: Path, source: str, target: str) -> Path:
        made = folder / "binarized"
        made.mkdir()
        tokenized = {}
        for name, path in files.items():
            split, language = name.split(".")
            lines = read_lines(path)
            if split != "train":
                (made / name).write_text("".join(line + "\n" for line in lines), encoding="utf-8")
            moses = sacremoses.MosesTokenizer(language)
            tokenized[name] = [moses.tokenize(line, return_str=True, escape=False) for line in lines]
        for split in ("train", "valid", "test"):
            lengths = [len(tokenized[f"{split}.{language}"]) for language in (source, target)]
            if lengths[0] != lengths[1]:
                raise ValueError(
                    f"{files[f'{split}.{source}']} has {lengths[0]} lines and {files[f'{split}.{target}']} has "
                    f"{lengths[1]}: sentence pairs must stand on the same lines."
                )
        codes = StringIO()
        training = [line for language in (source, target) for line in tokenized[f"train.{language}"]]
        learn_bpe(StringIO("\n".join(training) + "\n"), codes, self.merges)
        (made / "codes").write_text(codes.getvalue(), encoding="utf-8")
        encoder = BPE(codes)
        for name, lines in tokenized.items():
            (folder / name).write_text("".join(encoder.process_line(line) + "\n" for line in lines), encoding="utf-8")
        fairseq_preprocess(
            *("--source-lang", source, "--target-lang", target, "--joined-dictionary", "--destdir", str(made)),
            *("--trainpref", str(folder / "train"), "--validpref", str(folder / "valid")),
            *("--testpref", str(folder / "test")),
        )
        return made


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 text file, compressed or not; only a newline ends one."""
    content = path.read_bytes()
    text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8")
    return text.replace("\r\n", "\n").removesuffix("\n").split("\n")


def fairseq_preprocess(*arguments: str) -> None:
    """Run the command ``fairseq-preprocess`` in this process."""
    logger = logging.getLogger("fairseq_cli.preprocess")
    handlers = list(logger.handlers)
    try:
        fairseq_cli.preprocess.main(options.get_preprocessing_parser().parse_args(arguments))
    finally:
        for handler in set(logger.handlers) - set(handlers):  # a log file in the output folder
            logger.removeHandler(handler)
            handler.close()
