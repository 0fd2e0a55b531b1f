"""Recordings: read, refused, transformed, and cut into batches that hold the same samples in every layout."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from meshformer.bench.tones import RATE, texts, tones, write_rows, write_table
from meshformer.config import ConfigError
from meshformer.data import AudioTable, Features, Prompts, SpeechData
from meshformer.data.audio import BadClip, mel_filters, read_audio
from meshformer.data.recordings import letters, split_of


def data(table: Path, **settings: Any) -> SpeechData:
    usual: dict[str, Any] = dict(
        features=Features(RATE, 16), batch_size=8, context_length=64, frames_per_token=4, tokenizer="char", vocab_size=0,
        cache=table.parent / "cache", seed=1, eval_batch_size=4,
    )  # fmt: skip
    return SpeechData(AudioTable(str(table), validation_fraction=0.2), **{**usual, **settings})


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_table(tmp_path_factory.mktemp("tones"), texts(60))


@pytest.mark.parametrize("bands", [80, 128])  # 128: large-v3 and its turbo form
def test_features_are_whispers(bands: int) -> None:
    from transformers import WhisperFeatureExtractor
    from transformers.audio_utils import mel_filter_bank

    theirs = mel_filter_bank(201, bands, 0.0, 8000.0, 16000, norm="slaney", mel_scale="slaney")
    assert np.abs(theirs.T - mel_filters(201, bands, 16000)).max() < 1e-8
    sound = tones("abc def", 16000)
    whole = np.pad(sound, (0, 480000 - len(sound)))
    expected = WhisperFeatureExtractor(feature_size=bands)(sound, sampling_rate=16000, return_tensors="pt").input_features[0].T
    torch.testing.assert_close(Features(16000, bands, "whisper").of(whole), expected, atol=1e-4, rtol=0)


def test_features_of_a_clip_have_mean_0_and_deviation_1() -> None:
    x_FM = Features(RATE, 64).of(tones("abcd"))
    assert x_FM.shape == (len(tones("abcd")) // 80, 64)
    assert float(x_FM.mean()) == pytest.approx(0, abs=1e-5) and float(x_FM.std()) == pytest.approx(1, abs=1e-4)
    assert (mel_filters(201, 64, 8000).sum(1) > 0).all()  # no band is between two frequencies


def test_channels_are_averaged_and_other_rates_resampled(tmp_path: Path) -> None:
    time = np.arange(44100) / 44100
    tone = 0.5 * np.sin(2 * np.pi * 440 * time)
    for form in ("wav", "flac", "ogg", "mp3"):
        soundfile.write(tmp_path / f"a.{form}", np.stack((tone, 0 * tone), axis=1), 44100)
        wave = read_audio(tmp_path / f"a.{form}", 16000, 2)
        assert abs(len(wave) - 16000) < 16 and wave.dtype == np.float32
        spectrum = np.abs(np.fft.rfft(wave))
        assert np.argmax(spectrum) / len(wave) * 16000 == pytest.approx(440, abs=2)
        assert np.abs(wave).max() == pytest.approx(0.25, abs=0.02)


def bad_files(folder: Path) -> dict[str, str]:
    """Name of a bad recording -> what is said of it."""
    soundfile.write(folder / "silent.wav", np.zeros(8000), 8000)
    soundfile.write(folder / "empty.wav", np.zeros(0), 8000)
    soundfile.write(folder / "blip.wav", np.ones(100), 8000)
    soundfile.write(folder / "long.flac", np.zeros(1000 * 60 * 180, np.int16), 1000)  # three hours
    soundfile.write(folder / "whole.wav", tones("abc"), 8000)
    whole = (folder / "whole.wav").read_bytes()
    (folder / "cut.flac").write_bytes(b"")
    soundfile.write(folder / "sound.flac", np.tile(tones("abc"), 20), 8000)
    (folder / "cut.flac").write_bytes((folder / "sound.flac").read_bytes()[:2000])
    (folder / "cut.wav").write_bytes(whole[: len(whole) // 2])
    soundfile.write(folder / "sound.ogg", np.tile(tones("abc"), 20), 8000)
    (folder / "cut.ogg").write_bytes((folder / "sound.ogg").read_bytes()[:-3000])
    (folder / "bare.raw").write_bytes(whole)
    (folder / "text.wav").write_bytes(b"no sound at all")
    (folder / "header.wav").write_bytes(whole[:44])
    return {
        "silent.wav": "is silent", "empty.wav": "is empty", "blip.wav": "holds 0.01 s of sound", "long.flac": "lasts 10,800.0 s",
        "cut.flac": "c", "cut.wav": "is cut off", "cut.ogg": "is cut off", "bare.raw": "cannot be read",
        "text.wav": "cannot be read", "header.wav": "is empty", "absent.wav": "is missing",
    }  # fmt: skip


def test_bad_recordings_are_named(tmp_path: Path) -> None:
    for name, told in bad_files(tmp_path).items():
        with pytest.raises(BadClip, match=told):
            read_audio(tmp_path / name, 8000, 30)


def test_a_table_with_bad_rows_is_refused_or_read_without_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = write_table(tmp_path, texts(30))
    names = bad_files(tmp_path)
    rows = [(f"{i}.wav", text) for i, text in enumerate(texts(30))]
    rows += [(name, "abc") for name in names] + [("0.wav", "?!"), ("whole.wav", "abcdefgh " * 5)]
    write_rows(good, rows)
    told = r"silent\.wav \(row 32 of table\.csv\) is silent; .*; and 10 more\. Mend or remove them; data\.skip_bad=true"
    with pytest.raises(ConfigError, match=told):
        data(good).prepare_data()
    kept = data(good, skip_bad=True)
    kept.prepare_data()
    assert "left out 13 of 43 recordings" in capsys.readouterr().err
    assert len(kept.part("train").lengths) + len(kept.part("val").lengths) == 30


def test_a_transcript_that_does_not_fit_is_named(tmp_path: Path) -> None:
    write_table(tmp_path, texts(30))
    table = write_rows(tmp_path / "table.csv", [*((f"{i}.wav", text) for i, text in enumerate(texts(30))), ("0.wav", "aabb" * 9)])
    with pytest.raises(ConfigError, match=r"0\.wav \(row 32 of table\.csv\) has \d+ tokens of sound, too few for a transcript that needs 54: 'aabb"):
        data(table).prepare_data()


def test_transcripts_are_what_is_said() -> None:
    assert letters("  Press “1”, then—Größe… don’t (now) re-dial! a < b") == "press 1 then größe don't now re dial a b"
    assert letters("?!") == ""


def test_the_same_words_are_never_in_two_parts() -> None:
    shares = [split_of(text, 0.1, 0.1) for text in texts(2000)]
    assert 0.07 < shares.count("val") / 2000 < 0.13 and 0.07 < shares.count("test") / 2000 < 0.13
    assert all(split_of(text, 0.2, 0.0) == "val" for text in texts(2000) if split_of(text, 0.1, 0.1) == "val")  # a larger share only adds


def test_an_evaluation_has_each_recording_once_for_any_number_of_ranks(table: Path) -> None:
    whole = data(table)
    part = whole.part("val")
    wanted = sorted(text for _, text in part.names)
    for world in (1, 2, 3):
        found = []
        for rank in range(world):
            batches = whole.eval_batches("val", 2, rank, world)
            for batch in (batches[i] for i in range(len(batches))):
                for documents, targets in zip(batch["documents"], batch["targets"], strict=True):
                    if (documents >= 0).any():
                        found.append(whole.tokenizer.decode(targets[targets >= 0].tolist()))
        assert sorted(found) == wanted


def test_a_batch_holds_features_padding_and_targets(table: Path) -> None:
    whole = data(table, speeds=[1.0, 0.8])
    (batch,) = next(iter(whole.train_dataloader()))
    B, F, M = batch["features"].shape
    assert (B, M) == (8, 16) and batch["documents"].shape == (8, F // 4) and F % 32 == 0
    padding = (batch["documents"] < 0).repeat_interleave(4, dim=1)
    assert (batch["features"][padding] == 0).all() and (batch["features"][~padding] != 0).any()
    slow, plain = whole.part("train").lengths_at[1], whole.part("train").lengths_at[0]
    assert (np.abs(slow - 1.25 * plain) <= 5).all()  # frames; each is cut to whole tokens of 4


def test_masks_and_speeds_are_drawn_from_seed_and_number(table: Path) -> None:
    settings: dict[str, Any] = {"speeds": [1.0, 0.9], "mask_mels": 4, "mask_frames": 8}
    first, again, other = (list(data(table, **settings, seed=seed).train_dataloader()) for seed in (1, 1, 2))
    for (a,), (b,) in zip(first, again, strict=True):
        assert torch.equal(a["features"], b["features"])
    assert not all(torch.equal(a["features"], b["features"]) for (a,), (b,) in zip(first, other, strict=True))
    plain = list(data(table, speeds=[1.0, 0.9]).train_dataloader())
    assert all((a["targets"] == b["targets"]).all() for (a,), (b,) in zip(first, plain, strict=True))
    assert not any(torch.equal(a["features"], b["features"]) for (a,), (b,) in zip(first, plain, strict=True))


def test_prompts_are_read_from_a_folder(tmp_path: Path) -> None:
    sounds = tmp_path / "usr/share/asterisk/sounds/en_US_voice/digits"
    sounds.mkdir(parents=True)
    for name, text in (("digits/one", "abc"), ("digits/two", "abd"), ("digits/three", "a")):
        soundfile.write(sounds.parent / f"{name}.wav", tones(text), RATE)
    docs = tmp_path / "usr/share/doc/asterisk-core-sounds-en"
    docs.mkdir(parents=True)
    said = "; a comment\ndigits/one: Abc!\ndigits/two: 2\ndigits/three: [beep]\nabsent: abc\n"
    (docs / "core-sounds-en.txt").write_text(said)
    (clip,) = Prompts(tmp_path, folder=str(tmp_path)).clips()
    assert (clip.name, clip.text) == ("digits/one", "abc")
    with pytest.raises(ConfigError, match=r"data\.folder=.*: holds no transcripts"):
        Prompts(tmp_path, "fr", folder=str(tmp_path)).clips()
    with pytest.raises(ConfigError, match=r"data\.language=de: there are en, es, fr, it, ru"):
        Prompts(tmp_path, "de")


def test_without_apt_get_a_sentence_says_how_to_provide_the_recordings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"no apt-get\. Unpack the packages asterisk-core-sounds-en and asterisk-core-sounds-en-wav into a folder"):
        Prompts(tmp_path).clips()


def test_a_table_is_read_as_csv(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes('file,text\r\n"a, b.wav","please, hold\nthe line\u2028now"\r\n'.encode("utf-8-sig"))
    (clip,) = AudioTable(str(tmp_path / "a.csv")).clips()
    assert (clip.file, clip.text) == (tmp_path / "a, b.wav", "please hold the line now")
    for content, told in {
        "file,text\na.wav,\"b": "not closed",
        "file,text\na.wav,b,c\n": "3 cells",
        "name,text\na.wav,b\n": r"data.audio_column=file: a.csv has no such column",
        "file,text,text\na,b,c\n": "two columns are called text",
        "": "is empty",
    }.items():
        (tmp_path / "a.csv").write_text(content)
        with pytest.raises(ConfigError, match=told):
            AudioTable(str(tmp_path / "a.csv")).clips()
    (tmp_path / "latin.csv").write_bytes(b"file,text\na.wav,caf\xe9\n")
    (tmp_path / "a.csv").write_text("file,text\na.wav,b\n")
    with pytest.raises(ConfigError, match=r"data\.validation_file=.*not UTF-8"):
        AudioTable(str(tmp_path / "a.csv"), validation_file=str(tmp_path / "latin.csv")).clips()


def test_the_identity_is_of_contents(table: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(table.parent, tmp_path / "copied")) / "table.csv"
    os.utime(copied.parent / "0.wav", (1, 1))
    assert data(copied).identity == data(table).identity
    assert data(table, mask_mels=2).identity != data(table).identity != data(table, features=Features(RATE, 20)).identity
    soundfile.write(copied.parent / "0.wav", 0.9 * tones(texts(60)[0]), RATE)
    assert data(copied).identity != data(table).identity


def test_only_what_trains_is_slowed(tmp_path: Path) -> None:
    words = texts(30)
    table = write_table(tmp_path, words)
    longest = max(len(tones(text)) / RATE for text in words)
    kept = data(table, context_length=int(longest * 25) + 1, speeds=[1.0, 0.5], skip_bad=True)
    assert len(kept.part("train").lengths) < sum(split_of(text, 0.2, 0) == "train" for text in words)
    assert len(kept.part("val").lengths) == sum(split_of(text, 0.2, 0) == "val" for text in words)
    with pytest.raises(ConfigError, match=r"lasts \d\.\d s, \d\.\d s at speed 0\.5, and data\.context_length leaves room for"):
        data(table, context_length=int(longest * 25) + 1, speeds=[1.0, 0.5]).prepare_data()
