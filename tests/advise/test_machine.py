"""What the machine says of itself."""

from pathlib import Path

from distill.advise.machine import cpu_flags, features


def test_flags_are_those_of_few_bits(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text("processor : 0\nmodel name\t: x avx2\nflags\t\t: fpu avx2 avx512f avx512_vnni amx_bf16_more sse\n\nflags : amx_int8\n")
    assert cpu_flags(file) == ["avx2", "avx512f", "avx512_vnni"]
    file.write_text("Features : fp asimddp i8mm\n")
    assert cpu_flags(file) == ["asimddp", "i8mm"]
    assert cpu_flags(tmp_path / "none") == []


def test_features_in_words() -> None:
    found = features()
    assert {"CPU", "threads", "memory"} <= set(found)
    assert found["memory"].endswith(" GB")
