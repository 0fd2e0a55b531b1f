"""What recipes of speech fetch, made here: prompts as Debian's packages hold them, and a tiny model of Whisper's form."""

from __future__ import annotations

from pathlib import Path

import soundfile

from meshformer.bench.tones import RATE, texts, tones


def prompts_folder(folder: Path, count: int = 60) -> Path:
    """For data.folder: recordings of tones."""
    sounds, docs = folder / "usr/share/asterisk/sounds/en_US_tones", folder / "usr/share/doc/asterisk-core-sounds-en"
    sounds.mkdir(parents=True)
    docs.mkdir(parents=True)
    spoken = texts(count)
    for number, text in enumerate(spoken):
        soundfile.write(sounds / f"{number}.wav", tones(text), RATE)
    (docs / "core-sounds-en.txt").write_text("".join(f"{number}: {text}\n" for number, text in enumerate(spoken)))
    return folder


def tiny_whisper(folder: Path, layers: int = 5) -> Path:
    """For stage.init_from: a folder as transformers saves it."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    sizes = {"encoder_layers": layers, "decoder_layers": 1, "encoder_attention_heads": 1, "decoder_attention_heads": 1}
    ends = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 0)
    config = WhisperConfig(**sizes, **ends, vocab_size=9, d_model=8, encoder_ffn_dim=8, decoder_ffn_dim=8)
    WhisperForConditionalGeneration(config).save_pretrained(folder)
    return folder
