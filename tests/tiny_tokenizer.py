"""A tokenizer small enough for tiny models: one token per character, lossless on Latin-1 text."""

from pathlib import Path

BOS, EOS, UNK = "<s>", "</s>", "<unk>"


def tiny_tokenizer(path: str | Path) -> Path:
    """Save a tokenizer of 196 words into `path` and return it.

    Ids: 0 unknown, 1 begin, 2 end (also padding), then newline, tab, printable ASCII and Latin-1.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = ["\n", "\t", *map(chr, range(32, 127)), *map(chr, range(160, 256))]
    words = [UNK, BOS, EOS, *characters]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=UNK))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    core.decoder = decoders.Fuse()
    out = Path(path)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token=UNK, bos_token=BOS, eos_token=EOS, pad_token=EOS
    )
    tokenizer.save_pretrained(out)
    return out
