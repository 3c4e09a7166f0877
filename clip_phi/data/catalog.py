"""The data sets of 'clip-phi download': official addresses, published sizes and checksums, and where files go."""

from collections.abc import Sequence
from typing import NamedTuple


class RemoteFile(NamedTuple):
    """One file at its official address.

    path: where it is stored, relative to the folder of all data.
    size: in bytes; None if none is published. sha256: hex digest.
    members: what is unpacked from an archive into its own folder: a file, or a folder that ends in "/"."""

    url: str
    path: str
    size: int | None
    sha256: str
    members: tuple[str, ...] = ()

    def targets(self) -> list[str]:
        """What a reader needs of it, relative to the folder of all data."""
        folder = self.path.rpartition("/")[0]
        return [f"{folder}/{member}".strip("/") for member in self.members] or [self.path]


class RemoteDataset(NamedTuple):
    """about: a noun phrase for --help. data: how to name it in --data, with {0} for the folder of all data."""

    about: str
    data: tuple[str, ...]
    files: tuple[RemoteFile, ...]


COCO, VQA = "http://images.cocodataset.org", "https://s3.amazonaws.com/cvmlp/vqa/mscoco/vqa"
LLAVA = "https://huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K/resolve/main"
POPE = "https://raw.githubusercontent.com/AoiDragon/POPE/08d957b917e5a378a2f99d35b6293c536a66298b/output/coco"


def _images(name: str, size: int, sha256: str) -> RemoteFile:
    return RemoteFile(f"{COCO}/zips/{name}.zip", f"coco/{name}.zip", size, sha256, (f"{name}/",))


def _vqa(name: str, size: int | None, sha256: str, *members: str) -> RemoteFile:
    return RemoteFile(f"{VQA}/{name}.zip", f"vqav2/{name}.zip", size, sha256, members)


def _pope(name: str, size: int, sha256: str) -> RemoteFile:
    return RemoteFile(f"{POPE}/coco_pope_{name}.json", f"pope/coco_pope_{name}.json", size, sha256)


# Sizes and checksums: COCO and the Karpathy split from TensorFlow Datasets (url_checksums/coco_captions.txt), VQAv2
# from ParlAI (tasks/vqa_v2/build.py), LLaVA-Instruct from its page on the Hub, POPE from the commit in its address.
TRAIN2017 = _images("train2017", 19336861798, "69a8bb58ea5f8f99d24875f21416de2e9ded3178e903f1f7603e283b9e06d929")
VAL2017 = _images("val2017", 815585330, "4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05")
VAL2014 = _images("val2014", 6645013297, "fe9be816052049c34717e077d9e34aa60814a55679f804cd043e3cbee3b9fde0")
TEST2015 = _images("test2015", 13270587935, "1a2aa896b81140a850a78fa8bff07d455698d2abf364ff05721763458a8101ca")
CAPTIONS = RemoteFile(
    f"{COCO}/annotations/annotations_trainval2017.zip",
    "coco/annotations_trainval2017.zip",
    252907541,
    "113a836d90195ee1f884e704da6304dfaaecff1f023f49b6ca93c4aaae470268",
    ("annotations/captions_train2017.json", "annotations/captions_val2017.json"),
)
KARPATHY = RemoteFile(
    "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip",
    "coco/caption_datasets.zip",
    36745453,
    "4cfd70132527b80933105e5829dc9034eaab9573482e2e680abbab6130244817",
    ("dataset_coco.json",),
)
INSTRUCT = RemoteFile(
    f"{LLAVA}/llava_instruct_150k.json",
    "llava_instruct_150k.json",
    228941895,
    "6b68bc5ca2bfd8a71119af0e8454929668ccda6a334955ccc95d114fc8d082fa",
)
QUESTIONS = "v2_OpenEnded_mscoco_{}_questions.json"
VQA_FILES = (
    _vqa(
        *("v2_Questions_Train_mscoco", 7239401, "05a64b6e2582d06d7585f5429674a9a33851878be1bff9f8668cdcf792df611e"),
        QUESTIONS.format("train2014"),
    ),
    _vqa(
        *("v2_Annotations_Train_mscoco", 21708861, "fb101bcefe91422c543c2bb6d70af11eb3119d0ff745ae283d09acdf66250853"),
        "v2_mscoco_train2014_annotations.json",
    ),
    _vqa(
        *("v2_Questions_Val_mscoco", 3494929, "e71f6c5c3e97a51d050f28243e262b28cd0c48d11a6b4632d769d30d3f93222a"),
        QUESTIONS.format("val2014"),
    ),
    _vqa(
        *("v2_Annotations_Val_mscoco", 10518930, "0caae7c8d1dafd852727f5ac046bc1efca9b72026bd6ffa34fc489f3a7b3291e"),
        "v2_mscoco_val2014_annotations.json",
    ),
)
VQA_TEST = _vqa(
    *("v2_Questions_Test_mscoco", None, "982e2e687a86514b78ea83af356d151976c5e3fb4168a29ca543610574082ad7"),
    *(QUESTIONS.format("test2015"), QUESTIONS.format("test-dev2015")),
)
POPE_FILES = (
    _pope("random", 368166, "ac25245170b975a5bdf9080b23fd431dfe6be458bc038259c1f4f09a6bef7994"),
    _pope("popular", 370190, "72c1a8ad45d0c13514f5f22598261df41d3b533854d29682e924db50ed8aa753"),
    _pope("adversarial", 370401, "420b3407db1fa9f1187a805dca41cb7b97fd91504e6c2179706188c107fb8ef8"),
)
_CAPTIONS = "coco:{{0}}/coco/annotations/captions_{0}.json,images={{0}}/coco/{0}"
_VQA = "vqa:{{0}}/vqav2/v2_OpenEnded_mscoco_{0}_questions.json,annotations={{0}}/vqav2/v2_mscoco_{0}_annotations.json"
# The smallest first: the one that missing data are explained with.
DATASETS = {
    "coco-val": RemoteDataset(
        "COCO 2017's validation images and all captions", (_CAPTIONS.format("val2017"),), (CAPTIONS, VAL2017)
    ),
    "pope": RemoteDataset(
        "POPE's three files of questions and COCO's val2014 images",
        ("llava:{0}/pope/coco_pope_random.json,images={0}/coco/val2014",),
        (*POPE_FILES, VAL2014),
    ),
    "vqav2-test": RemoteDataset(
        "VQAv2's test questions, without answers, and COCO's test2015 images",
        (f"vqa:{{0}}/vqav2/{QUESTIONS.format('test-dev2015')},images={{0}}/coco",),
        (VQA_TEST, TEST2015),
    ),
    "llava-instruct": RemoteDataset(
        "LLaVA-Instruct-150K and COCO's train2017 images: the data of stage 2",
        ("llava:{0}/llava_instruct_150k.json,images={0}/coco/train2017",),
        (INSTRUCT, TRAIN2017),
    ),
    "coco": RemoteDataset(
        "COCO 2017's training and validation images and captions: the data of stage 1",
        (_CAPTIONS.format("train2017"), _CAPTIONS.format("val2017")),
        (CAPTIONS, VAL2017, TRAIN2017),
    ),
    "karpathy": RemoteDataset(
        "the Karpathy split and COCO 2017's images, which are those of 2014",
        ("karpathy:{0}/coco/dataset_coco.json,images={0}/coco,split=test",),
        (KARPATHY, VAL2017, TRAIN2017),
    ),
    "vqav2": RemoteDataset(
        "VQAv2's training and validation questions and answers, and COCO 2017's images",
        tuple(f"{_VQA.format(split)},images={{0}}/coco" for split in ("train2014", "val2014")),
        (*VQA_FILES, VAL2017, TRAIN2017),
    ),
}


def how_to_download(missing: Sequence[str]) -> str | None:
    """The command that downloads missing files, by the ends of their paths; None if none of them is known."""
    offers = {
        name: {target for file in dataset.files for target in file.targets()} for name, dataset in DATASETS.items()
    }
    wanted: dict[str, set[str]] = {}  # by the folder of all data
    for path in missing:
        for target in set().union(*offers.values()):
            if f"/{path}".endswith(f"/{target}"):
                wanted.setdefault(path.removesuffix(target).rstrip("/") or ".", set()).add(target)
    commands = []
    for root, targets in wanted.items():
        names = [name for name, offered in offers.items() if targets <= offered][:1]
        names = names or [next(name for name in offers if target in offers[name]) for target in sorted(targets)]
        commands += [f"'clip-phi download {name}{f' --output_dir {root}' * (root != 'data')}'" for name in names]
    return " and ".join(dict.fromkeys(commands)) or None
