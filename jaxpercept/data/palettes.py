"""Names and colours of the classes of semantic segmentation, by data set.

Colours are those that each data set publishes, so that pictures look as everybody knows them, or
else far apart (`spread_colours`); they are distinct, and none is black, which is void.
"""

import itertools
import math
from typing import NamedTuple

from jaxpercept.data.scenes.builder import CLASSES

Colour = tuple[int, int, int]


class Palette(NamedTuple):
    """Class k is called `names[k]` and drawn in `colours[k]` (8-bit RGB)."""

    names: tuple[str, ...]
    colours: tuple[Colour, ...]


def spread_colours(count: int) -> tuple[Colour, ...]:
    """Colours far apart from black and from each other, the first ones, of common classes, most.

    Each is the one of 64, on four levels of each channel, that is farthest from those before it.
    Painted classes want that: the decoder's errors and mixtures must stay nearest to their colour.
    """
    levels = range(0, 256, 85)
    left = list(itertools.product(levels, levels, levels))
    chosen = [left.pop(0)]
    while len(chosen) <= count:
        nearest = [min(math.dist(colour, other) for other in chosen) for colour in left]
        chosen.append(left.pop(nearest.index(max(nearest))))
    return tuple(chosen[1:])


def _table(text: str) -> Palette:
    """Lines `name red green blue`; a name may have several words."""
    rows = [line.rsplit(maxsplit=3) for line in text.strip().splitlines()]
    return Palette(
        tuple(row[0].strip() for row in rows),
        tuple((int(red), int(green), int(blue)) for _, red, green, blue in rows),
    )


# The 40 classes of NYU Depth v2 (Gupta et al., CVPR 2013); colours as in ScanNet and Hypersim.
_NYU40 = _table("""
wall 174 199 232
floor 152 223 138
cabinet 31 119 180
bed 255 187 120
chair 188 189 34
sofa 140 86 75
table 255 152 150
door 214 39 40
window 197 176 213
bookshelf 148 103 189
picture 196 156 148
counter 23 190 207
blinds 178 76 76
desk 247 182 210
shelves 66 188 102
curtain 219 219 141
dresser 140 57 197
pillow 202 185 52
mirror 51 176 203
floor mat 200 54 131
clothes 92 193 61
ceiling 78 71 183
books 172 114 82
refrigerator 255 127 14
television 91 163 138
paper 153 98 156
towel 140 153 101
shower curtain 158 218 229
box 100 125 154
whiteboard 178 127 135
person 120 185 128
night stand 146 111 194
toilet 44 160 44
sink 112 128 144
lamp 96 207 209
bathtub 227 119 194
bag 213 92 176
other structure 94 106 211
other furniture 82 84 163
other prop 100 85 144
""")

# The 13 classes of Couprie et al. (ICLR 2013) and the one that each of the 40 belongs to.
_NYU13_NAMES = (
    "bed", "books", "ceiling", "chair", "floor", "furniture", "objects", "picture", "sofa",
    "table", "television", "wall", "window",
)  # fmt: skip
NYU40_TO_13 = (
    11, 4, 5, 0, 3, 8, 9, 11, 12, 5, 7, 5, 12, 9, 5, 12, 5, 6, 6, 4,
    6, 2, 1, 5, 10, 6, 6, 6, 6, 6, 6, 5, 6, 6, 6, 6, 6, 6, 5, 6,
)  # fmt: skip

_CITYSCAPES = _table("""
road 128 64 128
sidewalk 244 35 232
building 70 70 70
wall 102 102 156
fence 190 153 153
pole 153 153 153
traffic light 250 170 30
traffic sign 220 220 0
vegetation 107 142 35
terrain 152 251 152
sky 70 130 180
person 220 20 60
rider 255 0 0
car 0 0 142
truck 0 0 70
bus 0 60 100
train 0 80 100
motorcycle 0 0 230
bicycle 119 11 32
""")
# Number in *_labelIds.png -> one of the 19 classes that are evaluated.
CITYSCAPES_IDS = {
    7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12,
    26: 13, 27: 14, 28: 15, 31: 16, 32: 17, 33: 18,
}  # fmt: skip

# CamVid's 11 classes and their order as in SegNet's copy.
_CAMVID = _table("""
sky 128 128 128
building 128 0 0
pole 192 192 128
road 128 64 128
pavement 60 40 222
tree 128 128 0
sign symbol 192 128 128
fence 64 64 128
car 64 0 128
pedestrian 64 64 0
bicyclist 0 128 192
""")

# Virtual KITTI 2's colors.txt; its black is void.
_VKITTI = _table("""
terrain 210 0 200
sky 90 200 255
tree 0 199 0
vegetation 90 240 0
building 140 140 140
road 100 60 100
guard rail 250 100 255
traffic sign 255 255 0
traffic light 200 200 0
pole 255 130 0
misc 80 80 80
truck 160 60 60
car 255 127 80
van 0 139 139
""")

# The 150 classes of the scene parsing benchmark. Officially, skyscrapers have the colour of roads
# (140, 140, 140); here they have one of their own.
_ADE20K = _table("""
wall 120 120 120
building 180 120 120
sky 6 230 230
floor 80 50 50
tree 4 200 3
ceiling 120 120 80
road 140 140 140
bed 204 5 255
windowpane 230 230 230
grass 4 250 7
cabinet 224 5 255
sidewalk 235 255 7
person 150 5 61
earth 120 120 70
door 8 255 51
table 255 6 82
mountain 143 255 140
plant 204 255 4
curtain 255 51 7
chair 204 70 3
car 0 102 200
water 61 230 250
painting 255 6 51
sofa 11 102 255
shelf 255 7 71
house 255 9 224
sea 9 7 230
mirror 220 220 220
rug 255 9 92
field 112 9 255
armchair 8 255 214
seat 7 255 224
fence 255 184 6
desk 10 255 71
rock 255 41 10
wardrobe 7 255 255
lamp 224 255 8
bathtub 102 8 255
railing 255 61 6
cushion 255 194 7
base 255 122 8
box 0 255 20
column 255 8 41
signboard 255 5 153
chest of drawers 6 51 255
counter 235 12 255
sand 160 150 20
sink 0 163 255
skyscraper 60 20 60
fireplace 250 10 15
refrigerator 20 255 0
grandstand 31 255 0
path 255 31 0
stairs 255 224 0
runway 153 255 0
case 0 0 255
pool table 255 71 0
pillow 0 235 255
screen door 0 173 255
stairway 31 0 255
river 11 200 200
bridge 255 82 0
bookcase 0 255 245
blind 0 61 255
coffee table 0 255 112
toilet 0 255 133
flower 255 0 0
book 255 163 0
hill 255 102 0
bench 194 255 0
countertop 0 143 255
stove 51 255 0
palm 0 82 255
kitchen island 0 255 41
computer 0 255 173
swivel chair 10 0 255
boat 173 255 0
bar 0 255 153
arcade machine 255 92 0
hovel 255 0 255
bus 255 0 245
towel 255 0 102
light 255 173 0
truck 255 0 20
tower 255 184 184
chandelier 0 31 255
awning 0 255 61
streetlight 0 71 255
booth 255 0 204
television receiver 0 255 194
airplane 0 255 82
dirt track 0 10 255
apparel 0 112 255
pole 51 0 255
land 0 194 255
bannister 0 122 255
escalator 0 255 163
ottoman 255 153 0
bottle 0 255 10
buffet 255 112 0
poster 143 255 0
stage 82 0 255
van 163 255 0
ship 255 235 0
fountain 8 184 170
conveyer belt 133 0 255
canopy 0 255 92
washer 184 0 255
plaything 255 0 31
swimming pool 0 184 255
stool 0 214 255
barrel 255 0 112
basket 92 255 0
waterfall 0 224 255
tent 112 224 255
bag 70 184 160
minibike 163 0 255
cradle 153 0 255
oven 71 255 0
ball 255 0 163
food 255 204 0
step 255 0 143
tank 0 255 235
trade name 133 255 0
microwave 255 0 235
pot 245 0 255
animal 255 0 122
bicycle 255 245 0
lake 10 190 212
dishwasher 214 255 0
screen 0 204 255
blanket 20 0 255
sculpture 255 255 0
hood 0 153 255
sconce 0 41 255
vase 0 255 204
traffic light 41 0 255
tray 41 255 0
ashcan 173 0 255
fan 0 245 255
pier 71 0 255
crt screen 122 0 255
plate 0 255 184
monitor 0 92 255
bulletin board 184 255 0
shower 0 133 255
radiator 255 214 0
glass 25 194 194
clock 102 255 0
flag 92 0 255
""")

PALETTES: dict[str, Palette] = {
    "scenes": Palette(CLASSES, spread_colours(len(CLASSES))),
    "nyu40": _NYU40,
    "nyu13": Palette(_NYU13_NAMES, spread_colours(13)),
    "cityscapes": _CITYSCAPES,
    "camvid": _CAMVID,
    "vkitti": _VKITTI,
    "ade20k": _ADE20K,
}
