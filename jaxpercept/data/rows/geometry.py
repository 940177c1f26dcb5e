"""Rows of depth and surface normals."""

from collections.abc import Sequence

from jaxpercept.data.cameras import Camera, read_kitti, read_matrix, read_taskonomy
from jaxpercept.data.hypersim import HypersimFiles
from jaxpercept.data.listings import Lists, Tree
from jaxpercept.data.nyuv2_mat import Labelled
from jaxpercept.data.palettes import NYU40_TO_13, PALETTES
from jaxpercept.data.readers import ClassesReader, RawFloat32Reader
from jaxpercept.data.row import Dataset
from jaxpercept.data.rows.build import beside, counted, dsine, files, lists
from jaxpercept.data.scannet_sens import SensFiles


def _nyuv2(name: str, labels: str, table: Sequence[int]) -> Dataset:
    labelled = {"train": 795, "test": 654}
    own = Lists(
        splits={"train": "train.txt", "test": "test.txt"},
        names=("rgb", "depth", "classes"),
        readers={"classes": ClassesReader(tuple(table))},
        expected=labelled,
    )
    marigold = lists(train="filename_list_train.txt", test="filename_list_test.txt")
    bts = "nyudepthv2_{}_files_with_gt.txt"
    bts = Lists(splits={s: bts.format(s) for s in ("train", "test")}, rooted=True)
    return Dataset(
        name,
        **files(
            Labelled(classes=tuple(table)),
            own,
            counted(marigold, **labelled),
            counted(bts, train=24231, test=654),
            counted(lists("rgb", "normals", test="nyuv2_test.txt"), test=654),
            dsine("*_img.png", expected=654, test="test/"),
        ),
        layout="nyu_depth_v2_labeled.mat with splits.mat (and classMapping40.mat for classes), or "
        "train.txt and test.txt with lines `rgb depth classes`, or the lists of Marigold "
        "(filename_list_{train,test}.txt; nyuv2_test.txt for normals) or of BTS "
        "(nyudepthv2_{train,test}_files_with_gt.txt), or DSINE's test/*_img.png with *_normal.png",
        depth_scale=1000.0,
        min_depth=1e-3,
        max_depth=10.0,
        eval_crop="nyu",
        # Of the toolbox that comes with the data, which counts pixels from 1 on.
        camera=Camera(518.85790, 519.46961, 325.08245, 253.23617, 480, 640),
        labels=labels,
        licence="NYU Depth v2, research use",
    )


_VKITTI_SCENES = {"train": ("02", "06", "18", "20"), "val": ("01",)}
_VKITTI_CONDITIONS = (
    "clone", "morning", "overcast", "sunset", "15-deg-left", "15-deg-right",
)  # fmt: skip


def _vkitti_tree(archive: str) -> Tree:
    """Version 2.0.3, unpacked into one folder or into one per archive, of names like `archive`."""

    def partner(kind: str, folder: str, name: str) -> tuple[str, str]:
        image = rf"^{archive.format('rgb')}(.*)/frames/rgb/(Camera_\d)/rgb_(\d+)\.jpg$"
        return image, rf"{archive.format(kind)}\1/frames/{folder}/\2/{name}_\3.png"

    return Tree(
        splits={
            split: tuple(
                f"{archive.format('rgb')}Scene{scene}/{condition}/frames/rgb/Camera_[01]/rgb_*.jpg"
                for scene in scenes
                for condition in _VKITTI_CONDITIONS
            )
            for split, scenes in _VKITTI_SCENES.items()
        },
        partners={
            "depth": partner("depth", "depth", "depth"),
            "normals": partner("normal", "normal", "normal"),
            "classes": partner("classSegmentation", "classSegmentation", "classgt"),
        },
        readers={"classes": ClassesReader(colours=PALETTES["vkitti"].colours)},
        expected={"train": 20148, "val": 5364},
    )


_KITTI_DATE = r"\d{4}_\d\d_\d\d"
_KITTI_CALIBRATION = r"\1/calib_cam_to_cam.txt"
_KITTI_ANNOTATED = (
    rf"^\w+/(({_KITTI_DATE})_drive_\d{{4}}_sync)/proj_depth/groundtruth/(image_0\d)/(\d+)\.png$"
)


ROWS = (
    _nyuv2("nyuv2", "nyu40", range(40)),
    _nyuv2("nyuv2_13", "nyu13", NYU40_TO_13),
    Dataset(
        "hypersim",
        **files(
            HypersimFiles(),
            Lists(
                splits={s: f"filename_list_{s}_filtered.txt" for s in ("train", "val", "test")},
                partners={"normals": (r"rgb_(cam_\d+_fr\d+)\.\w+$", r"normal_cam_\1.npy")},
                expected={"train": 53885, "val": 7370, "test": 7682},
            ),
            counted(
                lists(
                    "rgb",
                    "normals",
                    train="hypersim_filtered_all.txt",
                    val="hypersim_filtered_val.txt",
                    test="hypersim_filtered_test.txt",
                ),
                train=48925,
            ),
        ),
        layout="Hypersim's own files, ai_*/images/scene_cam_*_final_hdf5/*.color.hdf5 with "
        "*_geometry_hdf5/ and metadata_images_split_scene_v1.csv, or Marigold's "
        "filename_list_{train,val,test}_filtered.txt and the files they name, or for normals its "
        "hypersim_filtered_{all,val,test}.txt",
        depth_scale=1000.0,
        min_depth=1e-5,
        max_depth=65.0,
        depth_masks_normals=True,
        labels="nyu40",
        licence="Hypersim, CC BY-SA 3.0",
    ),
    Dataset(
        "vkitti",
        **files(
            counted(lists(train="vkitti_train.txt", val="vkitti_val.txt"), train=20148, val=5364),
            *(_vkitti_tree(archive) for archive in ("", "{}/", "vkitti_2.0.3_{}/")),
        ),
        layout="the archives of Virtual KITTI 2.0.3, Scene01/clone/frames/rgb/Camera_0/*.jpg and "
        "the like, in one folder or in rgb/, depth/, classSegmentation/ (also vkitti_2.0.3_rgb/ "
        "...), or Marigold's vkitti_{train,val}.txt",
        depth_scale=100.0,
        min_depth=1e-5,
        max_depth=80.0,
        crop="kitti_benchmark",
        eval_crop="eigen",
        depth_masks_normals=True,
        camera=Camera(725.0087, 725.0087, 621.0, 187.5, 375, 1242),
        labels="vkitti",
        licence="Virtual KITTI 2, CC BY-NC-SA 3.0",
    ),
    Dataset(
        "taskonomy",
        **files(
            lists(train="train.txt", test="test.txt"),
            Tree(
                splits={"train": ("*_rgb/rgb/*_domain_rgb.png",)},
                partners={
                    "depth": (
                        r"([^/]+)_rgb/rgb/(.*)_domain_rgb\.png$",
                        r"\1_depth_zbuffer/depth_zbuffer/\2_domain_depth_zbuffer.png",
                    ),
                    "intrinsics": (
                        r"([^/]+)_rgb/rgb/(.*)_domain_rgb\.png$",
                        r"\1_point_info/point_info/\2_domain_fixatedpose.json",
                    ),
                },
                readers={"intrinsics": read_taskonomy},
            ),
            Tree(
                splits={"train": ("rgb/taskonomy/*/*_domain_rgb.png",)},
                partners={
                    "depth": (
                        r"rgb/taskonomy/(.*)_domain_rgb\.png$",
                        r"depth_zbuffer/taskonomy/\1_domain_depth_zbuffer.png",
                    ),
                    "intrinsics": (
                        r"rgb/taskonomy/(.*)_domain_rgb\.png$",
                        r"point_info/taskonomy/\1_domain_fixatedpose.json",
                    ),
                },
                readers={"intrinsics": read_taskonomy},
            ),
        ),
        layout="train.txt and test.txt with lines `rgb depth`, or BUILDING_rgb/rgb/*_domain_rgb.png"
        " with BUILDING_depth_zbuffer/depth_zbuffer/*_domain_depth_zbuffer.png, or Omnidata's "
        "rgb/taskonomy/BUILDING/ with depth_zbuffer/taskonomy/BUILDING/",
        depth_scale=512.0,
        min_depth=1e-5,
        max_depth=65.0,
        licence="Taskonomy, non-commercial research use",
    ),
    Dataset(
        "kitti_eigen",
        **files(
            Lists(
                splits={
                    "train": "eigen_train_files_with_gt.txt",
                    "val": "eigen_val_from_train_800.txt",
                    "test": "eigen_test_files_with_gt.txt",
                },
                # The annotated depth unpacks into train/ and val/, of which the lists say nothing.
                homes={"depth": ("", "train/", "val/")},
                partners={"intrinsics": (rf"^({_KITTI_DATE})/.*$", _KITTI_CALIBRATION)},
                readers={"intrinsics": read_kitti},
                expected={"train": 23158, "val": 800, "test": 652},
            )
        ),
        layout="eigen_test_files_with_gt.txt (697 lines, 45 of them with None for the depth), for "
        "val eigen_val_from_train_800.txt, for train eigen_train_files_with_gt.txt of BTS, and the "
        "files they name: KITTI's raw data and its annotated depth, also in train/ and val/",
        depth_scale=256.0,
        min_depth=1e-5,
        max_depth=80.0,
        crop="kitti_benchmark",
        eval_crop="eigen",
        exact=("test",),
        licence="KITTI, CC BY-NC-SA 3.0",
    ),
    Dataset(
        "kitti",
        **files(
            Tree(
                by="depth",
                splits={
                    split: (f"{split}/*_sync/proj_depth/groundtruth/image_0[23]/*.png",)
                    for split in ("train", "val")
                },
                partners={
                    "rgb": (_KITTI_ANNOTATED, r"\2/\1/\3/data/\4.*"),
                    "intrinsics": (_KITTI_ANNOTATED, r"\2/calib_cam_to_cam.txt"),
                },
                readers={"intrinsics": read_kitti},
                expected={"train": 85898, "val": 6852},
            ),
            *(
                Tree(
                    splits={"selection": (f"{root}val_selection_cropped/image/*.png",)},
                    partners={
                        "depth": (
                            r"/image/(.*)_image_(\d+_image_0\d)\.png$",
                            r"/groundtruth_depth/\1_groundtruth_depth_\2.png",
                        ),
                        "intrinsics": (r"/image/(.*)\.png$", r"/intrinsics/\1.txt"),
                    },
                    readers={"intrinsics": read_matrix},
                    expected={"selection": 1000},
                )
                for root in ("", "depth_selection/")
            ),
        ),
        layout="KITTI's raw data, 2011_09_26/2011_09_26_drive_0001_sync/image_02/data/*.png and "
        "the like, with the annotated depth in train/ and val/, or for selection "
        "val_selection_cropped/ (also in depth_selection/)",
        depth_scale=256.0,
        min_depth=1e-5,
        max_depth=80.0,
        crop="kitti_benchmark",
        licence="KITTI, CC BY-NC-SA 3.0",
    ),
    Dataset(
        "scannet",
        **files(
            SensFiles(
                splits={
                    "train": "scannetv2_train.txt",
                    "val": "scannetv2_val.txt",
                    "test": "scannet_val_sampled_list_800_1.txt",
                },
                expected={"test": 800},
            ),
            counted(lists(test="scannet_val_sampled_list_800_1.txt"), test=800),
            counted(lists("rgb", "normals", test="scannet_test.txt"), test=300),
            dsine("scene*/*_img.png", expected=300, test=""),
        ),
        layout="ScanNet's own scans/SCENE/SCENE.sens with scannetv2_{train,val}.txt, or Marigold's "
        "scannet_val_sampled_list_800_1.txt with these or with the files it names, or for normals "
        "its scannet_test.txt or DSINE's scene*/*_img.png with *_normal.png",
        depth_scale=1000.0,
        min_depth=1e-3,
        max_depth=10.0,
        licence="ScanNet terms of use, non-commercial",
    ),
    Dataset(
        "eth3d",
        **files(
            Lists(
                splits={"test": "eth3d_filename_list.txt"},
                readers={"depth": RawFloat32Reader(4032, 6048)},
                expected={"test": 454},
            ),
            Tree(
                splits={"test": ("*/images/dslr_images/*.JPG",)},
                partners={
                    "depth": (r"/images/dslr_images/", "/ground_truth_depth/dslr_images/"),
                },
                readers={"depth": RawFloat32Reader(4032, 6048)},
                expected={"test": 454},
            ),
        ),
        layout="SCENE/images/dslr_images/*.JPG (distorted) with SCENE/ground_truth_depth/"
        "dslr_images/*.JPG of ETH3D's archives, or Marigold's eth3d_filename_list.txt with the "
        "folders rgb/ and depth/ it names",
        min_depth=1e-5,
        eval_resolution=756,
        alignment_max_resolution=1024,
        licence="ETH3D, CC BY-NC-SA 4.0",
    ),
    Dataset(
        "diode",
        **files(
            Lists(
                splits={"test": "diode_val_all_filename_list.txt"},
                names=("rgb", "depth", "mask"),
                partners={"normals": (r"\.png$", "_normal.npy")},
                expected={"test": 771},
            ),
            counted(lists("rgb", "normals", test="diode_test.txt"), test=771),
            Tree(
                splits={
                    "train": ("train/*/scene_*/scan_*/*.png",),
                    "test": ("val/*/scene_*/scan_*/*.png",),
                },
                partners={
                    "depth": (r"\.png$", "_depth.npy"),
                    "mask": (r"\.png$", "_depth_mask.npy"),
                    "normals": (r"\.png$", "_normal.npy"),
                },
                expected={"train": 25458, "test": 771},
            ),
        ),
        layout="train/ and val/ with {indoors,outdoor}/scene_*/scan_*/*.png, *_depth.npy, "
        "*_depth_mask.npy and *_normal.npy, or Marigold's diode_val_all_filename_list.txt "
        "(diode_test.txt for normals)",
        eval_range=(0.6, 350.0),
        eval_resolution=640,
        camera=Camera(886.81, 927.06, 512.0, 384.0, 768, 1024),
        licence="DIODE, MIT",
    ),
    Dataset(
        "ibims1",
        **files(
            Tree(
                splits={"test": ("rgb/*.png",)},
                partners=beside(
                    "rgb", depth="depth", mask="mask_invalid", mask_transparent="mask_transp"
                ),
                expected={"test": 100},
            ),
            counted(lists("rgb", "normals", test="ibims_test.txt"), test=100),
            dsine("*_img.png", expected=100, test=""),
        ),
        layout="ibims1_core_raw with rgb/, depth/, mask_invalid/ and mask_transp/, or for normals "
        "Marigold's ibims_test.txt or DSINE's *_img.png with *_normal.png",
        depth_scale=65535 / 50,
        min_depth=1e-5,
        max_depth=50.0,
        licence="iBims-1, research use",
    ),
    Dataset(
        "sintel",
        **files(
            counted(lists("rgb", "normals", all="sintel_filtered.txt"), all=627),
            dsine("*/frame_*_img.png", suffix="exr", all=""),
        ),
        layout="Marigold's sintel_filtered.txt and the files it names, or DSINE's "
        "SCENE/frame_*_img.png with frame_*_normal.exr",
        licence="MPI Sintel, research use",
    ),
)
