"""The gate on the kernels' machine code reads what cuobjdump prints, and judges it rightly."""

import sass_gate
from sass_gate import Kernel, check_usage, check_warpgroup, parse_instructions, parse_usage

USAGE = """
Fatbin elf code:
================
arch = sm_80

Resource usage:
 Function first:
  REG:40 STACK:0 SHARED:1024 LOCAL:0 CONSTANT[0]:380 TEXTURE:0 SURFACE:0 SAMPLER:0

Fatbin elf code:
================
arch = sm_90a

Resource usage:
 Function second:
  REG:168 STACK:256 SHARED:0 LOCAL:8 CONSTANT[0]:1408 TEXTURE:0 SURFACE:0 SAMPLER:0
"""

GOOD = "attention_kernelINS_6TraitsILi128ELNS_10BlockSizesE0EEEEE"

CODE = f"""
arch = sm_90a

\t\tFunction : {GOOD}
        /*0000*/                   LDC R1, c[0x0][0x28] ;          /* 0x00000a00ff017b82 */
                                                                   /* 0x000fe20000000800 */
        /*0010*/                   HGMMA.64x128x16.F32.BF16 R24 ;  /* 0x0000000000003919 */
        /*0020*/             @!UP0 HGMMA.64x128x16.F32.BF16 R24 ;  /* 0x0000000000003919 */
        /*0030*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ; /* 0x0000000000003919 */
        /*10000*/              @P1 BRA 0x12f0 ;                    /* 0x0000001000a40947 */

\t\tFunction : bad
        /*0000*/                   HMMA.16816.F32 R4, R8, R2, R4 ; /* 0x0000000000003919 */
        /*0010*/               @P0 STL.64 [R1], R2 ;               /* 0x0000000000003919 */
"""


def test_usage():
    kernels = list(parse_usage(USAGE))
    assert kernels == [
        Kernel("sm_80", "first", registers=40, stack=0, local=0),
        Kernel("sm_90a", "second", registers=168, stack=256, local=8),
    ]
    assert list(check_usage(kernels)) == [
        "second (sm_90a) uses 256 bytes of stack",
        "second (sm_90a) uses 8 bytes of local memory",
    ]


def test_instructions():
    instructions = parse_instructions(CODE)
    assert instructions == {
        ("sm_90a", GOOD): {
            **{"LDC": 1, "BRA": 1},
            **{"HGMMA": 2, "HGMMA.64": 2, "WARPGROUP": 1, "WARPGROUP.DEPBAR": 1},
        },
        ("sm_90a", "bad"): {"HMMA": 1, "HMMA.16816": 1, "STL": 1, "STL.64": 1},
    }


def test_warpgroup_kernels(monkeypatch):
    instructions = parse_instructions(CODE)
    monkeypatch.setattr(sass_gate, "ATTENTION_COUNTS", {128: (2, 1)})
    assert list(check_warpgroup(instructions)) == ["bad (sm_90a) has HMMA", "bad (sm_90a) has STL"]
    monkeypatch.setattr(sass_gate, "ATTENTION_COUNTS", {128: (2, 0)})
    assert next(check_warpgroup(instructions)) == (
        f"{GOOD} (sm_90a) must have 2 HGMMA and 0 WARPGROUP.DEPBAR, got 2 and 1"
    )
