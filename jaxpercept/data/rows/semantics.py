"""Rows of masks, mattes, classes and keypoints."""

from collections.abc import Sequence

from jaxpercept.data.cameras import read_cityscapes, read_cityscapes_depth
from jaxpercept.data.coco import open_coco_keypoints
from jaxpercept.data.joints import FLIP_PAIRS, KEYPOINTS
from jaxpercept.data.listings import Tree
from jaxpercept.data.palettes import CITYSCAPES_IDS
from jaxpercept.data.readers import VOID, ClassesReader
from jaxpercept.data.row import Dataset
from jaxpercept.data.rows.build import beside, either, files, lists

_CITYSCAPES = {
    "depth": "disparity/{}_disparity.png",
    "classes": "gtFine/{}_gtFine_labelIds.png",
    "intrinsics": "camera/{}_camera.json",
}


def _cityscapes_tree(targets: Sequence[str], **expected: int) -> Tree:
    return Tree(
        splits={split: (f"leftImg8bit/{split}/*/*_leftImg8bit.png",) for split in expected},
        partners={
            field: (r"leftImg8bit/(.*)_leftImg8bit\.png$", _CITYSCAPES[field].format(r"\1"))
            for field in (*targets, "intrinsics")
        },
        readers={
            "classes": ClassesReader(tuple(CITYSCAPES_IDS.get(i, VOID) for i in range(34))),
            "depth": read_cityscapes_depth,
            "intrinsics": read_cityscapes,
        },
        needs={"depth": ("intrinsics",)},
        facts={"depth_scale": 1.0},
        expected=expected,
    )


ROWS = (
    Dataset(
        "dis5k",
        **files(
            *(
                Tree(
                    splits=splits,
                    partners=beside("im", alpha="gt"),
                    expected={"train": 3000, "test": 2000, "val": 470}
                    | dict.fromkeys(("te1", "te2", "te3", "te4"), 500),
                )
                for splits in either(
                    "DIS5K",
                    train="DIS-TR/im/*",
                    te1="DIS-TE1/im/*",
                    te2="DIS-TE2/im/*",
                    te3="DIS-TE3/im/*",
                    te4="DIS-TE4/im/*",
                    test="DIS-TE1/im/* DIS-TE2/im/* DIS-TE3/im/* DIS-TE4/im/*",
                    val="DIS-VD/im/*",
                )
            )
        ),
        layout="DIS-TR/, DIS-VD/ and DIS-TE1/ ... DIS-TE4/, each with im/*.jpg and gt/*.png",
        licence="DIS5K, non-commercial research use",
    ),
    Dataset(
        "p3m10k",
        **files(
            *(
                Tree(
                    splits=splits,
                    partners={
                        field: (r"/(?:blurred|original)_image/(.+)\.\w+$", rf"/{folder}/\1.png")
                        for field, folder in (("alpha", "mask"), ("trimap", "trimap"))
                    },
                    expected={"train": 9421, "p": 500, "np": 500},
                )
                for splits in either(
                    "P3M-10k",
                    train="train/blurred_image/*",
                    np="validation/P3M-500-NP/original_image/*",
                    p="validation/P3M-500-P/blurred_image/*",
                )
            )
        ),
        layout="train/ and validation/P3M-500-P/ with blurred_image/*.jpg and mask/*.png, "
        "validation/P3M-500-NP/ with original_image/*.jpg; trimap/*.png in the last two",
        licence="P3M-10k, non-commercial research use",
    ),
    Dataset(
        "aim500",
        **files(
            *(
                Tree(
                    splits=splits,
                    partners=beside("original", alpha="mask", trimap="trimap"),
                    expected={"test": 500},
                )
                for splits in either("AIM-500", test="original/*")
            )
        ),
        layout="original/*.jpg, mask/*.png and trimap/*.png",
        licence="AIM-500, non-commercial research use",
    ),
    Dataset(
        "alphamatting",
        **files(
            Tree(
                splits={"all": ("image/*",)},
                partners=beside("image", suffix="*", alpha="alpha", trimap="trimap"),
            )
        ),
        layout="image/NAME.*, alpha/NAME.png and trimap/NAME.png",
        licence="alphamatting.com, research use",
    ),
    Dataset(
        "masks",
        **files(
            Tree(splits={"all": ("image/*",)}, partners=beside("image", suffix="*", alpha="mask"))
        ),
        layout="image/NAME.* and mask/NAME.*",
        licence="yours",
    ),
    Dataset(
        "camvid",
        **files(
            Tree(
                splits={s: (f"{s}/*",) for s in ("train", "val", "test")},
                partners={"classes": (r"^(train|val|test)/(.+)\.\w+$", r"\1annot/\2.png")},
                readers={"classes": ClassesReader(tuple(range(11)))},
                expected={"train": 367, "val": 101, "test": 233},
            )
        ),
        layout="train/, val/ and test/ with images, trainannot/, valannot/ and testannot/ with PNG",
        labels="camvid",
        licence="CamVid, research use",
    ),
    Dataset(
        "cityscapes",
        **files(
            lists(train="train.txt", test="test.txt"),
            _cityscapes_tree(("depth", "classes"), train=2975, val=500),
            _cityscapes_tree(("depth",), test=1525),  # whose labels are not published
        ),
        layout="leftImg8bit/{train,val,test}/CITY/*_leftImg8bit.png with gtFine/.../CITY/"
        "*_gtFine_labelIds.png for classes, disparity/.../CITY/*_disparity.png and "
        "camera/.../CITY/*_camera.json for depth, or for depth train.txt and test.txt with lines "
        "`rgb depth`",
        depth_scale=300.0,
        min_depth=1e-5,
        max_depth=80.0,
        labels="cityscapes",
        licence="Cityscapes, non-commercial research use",
    ),
    Dataset(
        "ade20k",
        **files(
            *(
                Tree(
                    splits=splits,
                    partners=beside("images", classes="annotations"),
                    readers={"classes": ClassesReader((VOID, *range(150)))},
                    expected={"train": 20210, "val": 2000},
                )
                for splits in either(
                    "ADEChallengeData2016", train="images/training/*", val="images/validation/*"
                )
            )
        ),
        layout="images/{training,validation}/*.jpg and annotations/{training,validation}/*.png of "
        "the scene parsing benchmark",
        labels="ade20k",
        licence="ADE20K, non-commercial research use",
    ),
    Dataset(
        "coco_keypoints",
        open_coco_keypoints,
        splits=("train", "val"),
        provides=frozenset({"keypoints"}),
        layout="annotations/person_keypoints_{train,val}2017.json, train2017/ and val2017/",
        keypoint_names=KEYPOINTS,
        flip_pairs=FLIP_PAIRS,
        licence="COCO 2017, CC BY 4.0 (annotations), Flickr terms (images)",
    ),
)
