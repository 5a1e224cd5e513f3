import numpy as np

from data.array_images import ArrayImages
from data.digits import load_digits, open_digits

DIGEST = "f7a01b5e402948fd4aab7f9cc0484b97e8f98b91fe693b980bec42a25e05ad38"


def test_the_digest_is_that_of_images_and_labels():
    images, labels = load_digits("train")
    classes = list(map(str, range(10)))
    assert open_digits("train").digest() == DIGEST, "recorded once: checkpoints have it"
    assert open_digits("train", flip=True, seed=3).digest() == ArrayImages(images, labels, classes).digest()
    brighter, relabelled = images.copy(), labels.copy()
    brighter[700, 3, 3] ^= 1
    relabelled[700] = 9 - relabelled[700]
    order = np.arange(len(labels))[::-1]
    others = [
        open_digits("test"),
        ArrayImages(brighter, labels, classes),
        ArrayImages(images, relabelled, classes),
        ArrayImages(images[order], labels[order], classes),
    ]
    assert len({DIGEST, *(other.digest() for other in others)}) == 5
