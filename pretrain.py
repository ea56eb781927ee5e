"""Stage 1 of 4: train the segmenter f on the known classes, with cross-entropy L_k alone (Sec. IV-A).

    in     a dataset folder (--data, --root); the toy data is written to data/toy on first use
    out    pretrained.pt    checkpoint that the later stages read (keys: load_checkpoint in common.py)
           pretrained.jsonl every logged value; pretrained.png loss and validation mIoU

    python pretrain.py                                                            # toy data: minutes on two CPU cores
    python pretrain.py --data streethazards --root /data/streethazards            # the paper's recipe, one GPU
    torchrun --nproc-per-node 8 pretrain.py --data streethazards --root /data/streethazards --cache /scratch
    torchrun --nnodes 2 --node-rank 0 --master-addr HOST --nproc-per-node 8 pretrain.py ...    # on each of 2 machines

A run that was stopped or killed continues when the same command is given again.
"""
import argparse

import torch

import common


def parse():
    p = argparse.ArgumentParser(description="Train the segmenter on the known classes (Sec. IV-A).",
                                epilog="'paper' is a value of the paper, 'ours' one that it leaves open.")
    g = p.add_argument_group("data")
    g.add_argument("--data", choices=tuple(common.DATASETS), default="toy", help="dataset (paper: streethazards, bdd; default: toy)")
    g.add_argument("--root", help="folder of the dataset (default: data/<name>)")
    g.add_argument("--anomaly", nargs="+", metavar="CLASS", help="camvid, bdd: the classes that are the anomalies "
                   "(default: bicyclist; train and motorcycle, Sec. IV-A)")
    g.add_argument("--cache", metavar="DIR", help="keep a decoded, memory-mapped copy of the training images here (default: decode each time)")
    g.add_argument("--crop", type=common.whole(16), nargs=2, metavar=("H", "W"), help="pixels of a training crop (ours: 512 512)")
    g.add_argument("--scale", type=common.real(0.01), nargs=2, metavar=("LOW", "HIGH"), help="range of the random scale, factors (ours: 0.5 2)")
    g = p.add_argument_group("model")
    g.add_argument("--arch", choices=common.ARCHS, help="segmentation head (paper: deeplabv3 and pspnet, Sec. IV-A)")
    g.add_argument("--backbone", choices=tuple(common.BACKBONES), help="feature extractor (ours: resnet50; toy, camvid: mobilenet_v3_large)")
    g.add_argument("--weights", help="imagenet, none, or a state-dict file for the backbone (ours: imagenet; toy, camvid: none)")
    common.training_flags(p, "passes over the training images (paper: 1000; toy: 8, camvid: 40)")
    p.add_argument("--val-every", type=common.whole(), help="epochs between validations (default: a fiftieth of --epochs)")
    p.add_argument("--out", default="pretrained.pt", help="checkpoint to write (default: pretrained.pt)")
    args = p.parse_args()
    if args.scale and args.scale[0] > args.scale[1]:
        p.error(f"argument --scale: LOW {args.scale[0]} is above HIGH {args.scale[1]}")
    return args


def main():
    args = parse()
    device = common.setup(args.device, tf32=True)
    common.say(common.resolve(args, "pretrain", args.data))
    args.alpha, args.loss = 0, "er"   # Eq. 5 with an empty D_s
    with common.first_rank_first():
        args.root = common.default_root(args.data, args.root)
        scenes = common.Scenes(args.data, args.root, "train", args.anomaly, args.crop, args.scale, args.seed, cache=args.cache)
        val = common.Scenes(args.data, args.root, "val", args.anomaly)
    torch.manual_seed(args.seed)
    f = common.Segmenter(args.arch, args.backbone, len(scenes.classes))
    common.load_backbone(f, args.weights)
    f = f.to(device, memory_format=torch.channels_last)
    common.say(common.about_run(device, f))
    common.say(f"{args.data} at {args.root}: {len(scenes)} training and {len(val)} validation images, N = {len(scenes.classes)}")

    names = ("data", "anomaly", "arch", "backbone", "weights", "epochs", "batch_size", "lr", "crop", "scale", "schedule", "bn", "seed")
    settings = dict({n: getattr(args, n) for n in names}, dataset=scenes.identity())
    facts = dict(stage="pretrain", arch=args.arch, backbone=args.backbone, classes=list(scenes.classes), data=args.data,
                 root=args.root, anomaly=args.anomaly)
    common.train(f, scenes, args, device, settings, facts,
                 validate=lambda f: common.validation(f, val, device), val_every=args.val_every or max(1, args.epochs // 50))


if __name__ == "__main__":
    common.cli(main)
