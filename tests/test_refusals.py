"""Parameters that are refused, by every method that takes them as text: out of range, or not for this model."""

from __future__ import annotations

import pytest

import leanvit
from leanvit.methods import parse

from .contract import photos, small_vit

BAD = [
    ("dgsa", r"unknown method 'dgsa'; known are .*dgssa"),
    ("dgssa:layer=1", "dgssa has no parameter 'layer'; it has layers"),
    ("dgssa:layers", "'layers' is not of the form parameter=value"),
    ("dgssa:layers=auto:0", "'auto:0' is not"),
    ("dgssa:layers=some", "'some' is not a list of blocks"),
    ("dgssa:layers=1,1", "each given once"),
    ("dgssa:layers=-1", "block indices from 0"),
    ("dgssa:layers=0.5", "layers=0.5 must be block indices"),
    ("dgssa:guidance=2", "guidance=2 is not in"),
    ("dgssa:guidance=soon", "guidance='soon' is not a number"),
    ("dgssa:guidance_weight=-1", "guidance_weight=-1 is negative"),
    ("dgssa:max_mb=0", "max_mb=0 is not positive"),
    ("dgssa:grid=0", "grid=0 is not a number of patches from 1 on"),
    ("dgssa:grid=4,4,4", r"grid=\(4, 4, 4\) is not a number of patches"),
    ("dgssa:layers=3-1", "'3-1' is an empty range"),
    ("dgssa:guidance=nan", "guidance=nan is not a number"),
    ("dgssa:layers=1,layers=2", "a parameter is given twice"),
    ("dgssa+", "unknown method ''"),
    ("", "unknown method ''"),
    ("glad:keep=0", "keep=0 is not in"),
    ("glad:keep=1.5", "keep=1.5 is not in"),
    ("glad:keep=half", "keep='half' is not in"),
    ("glad:at=2,2", "each given once"),
    ("pruning:keep=0", r"pruning: keep=0 is not in \(0, 1\]"),
    ("pruning:keep=-0.5", r"pruning: keep=-0\.5 is not in"),
    ("pruning:keep=1.5", r"pruning: keep=1\.5 is not in"),
    ("pruning:keep=most", r"pruning: keep='most' is not in"),
    ("pruning:at=2,1", r"pruning: at=\(2, 1\) is out of order"),
    ("pruning:at=1,1", "each given once"),
    ("pruning:at=-1", "block indices from 0"),
    ("pruning:at=auto", "pruning: at='auto' is not a list of blocks"),
    ("pruning:fuse=1", "pruning: fuse=1 is neither true nor false"),
    ("merging:r=-1", r"merging: r=-1 is not a number of tokens"),
    ("merging:r=0.5", r"merging: r=0\.5 is not a number of tokens"),
    ("merging:r=2,-2", r"merging: r=-2 is not a number of tokens"),
    ("merging:r=4,keep=0.5", r"merging: r=4 and keep=0\.5 are both given"),
    ("merging:keep=0", r"merging: keep=0 is not in \(0, 1\]"),
    ("merging:keep=1.1", r"merging: keep=1\.1 is not in \(0, 1\]"),
    ("merging:keep=0.5,0.5", r"merging: keep=\(0\.5, 0\.5\) must be one share"),
    ("merging:first=-1", r"merging: first=-1 is not a block"),
    ("merging:r=2,2,2,2,first=1", r"merging: first=1 beside r for each block"),
    ("castling:kernel=4", "kernel=4 is not an odd number of taps"),
    ("castling:kernel=-3", "kernel=-3 is not an odd number"),
    ("castling:kernel=2.5", r"kernel=2\.5 is not an odd number"),
    ("castling:conv=spiral", "conv='spiral' is not one of grid, tokens"),
    ("castling:layers=some", "layers='some' is not 'all', a range such as '4-11' or block indices"),
    ("castling:layers=auto:2", "layers='auto:2' is not 'all'"),
    ("castling:layers=1,1", "each given once"),
    ("castling:layers=3-1", "'3-1' is an empty range"),
    ("castling:auxiliary=1.5", r"auxiliary=1\.5 is not in \[0, 1\]"),
    ("castling:auxiliary=-0.1", r"auxiliary=-0\.1 is not in"),
    ("castling:auxiliary=long", "auxiliary='long' is not a number"),
    ("castling:threshold=0", r"threshold=0 is not in \(0, 1\]"),
    ("castling:threshold=2", "threshold=2 is not in"),
    ("castling:threshold=nan", "threshold=nan is not a number"),
    ("castling:sparsity_weight=-1", "sparsity_weight=-1 is negative"),
]

UNFIT = [
    ("dgssa:layers=4", "dgssa: block 4 does not exist; the model has blocks 0 to 3"),
    ("glad:at=9", "glad: block 9 does not exist"),
    ("glad:at=1,2,keep=0.5,0.5,0.5", "keep has 3 values for 2 stages"),
    ("dgssa:layers=auto:3+glad:at=2", "asks for 3 layers and only 2 come before tokens are reduced"),
    ("dgssa:layers=auto:5", "asks for 5 layers and only 4"),
    (
        "glad:at=1+dgssa:layers=1",
        "dgssa: block 1 needs every token at its place, but glad reduces the tokens before block 1",
    ),
    ("dgssa:layers=0,3+glad:at=2", "dgssa: block 3 needs every token"),
    ("dgssa:layers=0,max_mb=0.001", r"takes 0\.00347 MB a layer, over max_mb=0\.001; use a smaller input"),
    ("glad:at=1+glad:at=2", "glad is given more than once"),
    ("glad:at=auto,keep=0.1", "no place for stage"),
    ("pruning:at=1,4", "pruning: block 4 does not exist; the model has blocks 0 to 3"),
    ("pruning:at=1,2,keep=0.5,0.5,0.5", "pruning: keep has 3 values for 2 stages"),
    (
        "dgssa:layers=0,1+pruning:at=1",
        r"pruning: block 1 cannot score tokens: its attention \(static attention, .*\) has no queries to tell",
    ),
    ("pruning:at=1+dgssa:layers=2", "dgssa: block 2 needs every token at its place, but pruning reduces .* in block 1"),
    ("pruning:at=1+glad:at=2", "glad: block 2 needs the same tokens in every image, but pruning reduces"),
    ("merging:r=2,2,2", "merging: r has 3 values for 4 blocks; give one, or one a block"),
    ("merging:first=4", "merging: block 4 does not exist"),
    ("merging:keep=0.2,first=3", r"merging: keep=0\.2 would merge more than half of the tokens of one block"),
    ("dgssa:layers=2+merging:r=2", "dgssa: block 2 needs every token at its place, but merging reduces .* in block 0"),
    (
        "dgssa:layers=0+merging:r=2",
        r"merging: block 0 cannot match tokens: its attention \(static attention, .*\) has no keys to tell",
    ),
    ("merging:r=2+glad:at=2", "glad: block 2 needs the same tokens in every image, but merging reduces"),
    ("pruning:at=1+merging:r=2", "merging: block 1 reduces its tokens by pruning already; use other blocks"),
    ("castling:kernel=5", "kernel=5 is larger than the patch grid of 4×4; use at most 4"),
    ("castling:layers=4", "castling: block 4 does not exist"),
    ("castling:kernel=3+dgssa:layers=1", "dgssa: the attention of block 1 is castling's already"),
    ("dgssa:layers=1+castling:kernel=3", "castling: the attention of block 1 is dgssa's already; give each block"),
    ("castling:kernel=3+sparsifiner:layers=2,keep=0.5", "sparsifiner: the attention of block 2 is castling's already"),
    ("castling:kernel=3+pruning:at=1", "pruning: block 1 cannot score tokens: its attention .castling.* no queries"),
    ("castling:kernel=3+glad:at=2", "block 2 needs to know the place of each token, but glad .*or conv=tokens"),
]


@pytest.mark.parametrize(("text", "message"), BAD)
def test_bad_parameters(text, message):
    with pytest.raises(leanvit.ConfigError, match=message):
        parse(text)


@pytest.mark.parametrize(("text", "message"), UNFIT)
def test_parameters_that_do_not_fit_the_model(text, message):
    vit = small_vit()
    with pytest.raises(leanvit.MethodError, match=message):
        leanvit.slim(vit, *parse(text), images=photos(vit))
