"""tinylab: ResNet-18 trained from scratch on Tiny ImageNet, as one experiment that reads from
archive to figure."""
