"""Defines papers as references (short, with a link, as BibTeX), and lists those of this package's methods."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass


@dataclass(frozen=True)
class Citation:
    """One paper.

    Attributes:
        key: its unique name here.
        title: as published.
        authors: full names, in the paper's order.
        year: of the first publication (of the arXiv entry if there is one).
        venue: with the year ("ICLR 2024"); "" if it is only on arXiv.
        arxiv: the arXiv number, or None.
        page: the paper's address if it is not on arXiv.
    """

    key: str
    title: str
    authors: tuple[str, ...]
    year: int
    venue: str = ""
    arxiv: str | None = None
    page: str | None = None

    @property
    def names(self) -> str:
        """Surnames as in running text: one, two joined by "&", or the first with "et al."."""
        surnames = [_surname(author) for author in self.authors]
        return " & ".join(surnames) if len(surnames) < 3 else f"{surnames[0]} et al."

    @property
    def short(self) -> str:
        """ "Sun et al. 2023, arXiv 2306.11695": for tables and messages."""
        place = f"arXiv {self.arxiv}" if self.arxiv else self.venue
        return f"{self.names} {self.year}, {place}" if place else f"{self.names} {self.year}"

    @property
    def url(self) -> str:
        """The paper's address."""
        return f"https://arxiv.org/abs/{self.arxiv}" if self.arxiv else self.page or ""

    @property
    def bibtex(self) -> str:
        """The BibTeX entry, without a newline at the end; braces keep the title's capitals."""
        surname = unicodedata.normalize("NFKD", _surname(self.authors[0])).encode("ascii", "ignore").decode()
        name, _, year = self.venue.rpartition(" ")
        fields = {
            "title": f"{{{self.title}}}",
            "author": " and ".join(f"{_surname(author)}, {_given(author)}" for author in self.authors),
            "year": year if name else str(self.year),
        }
        if name:
            fields["booktitle"] = name
        if self.arxiv:
            fields |= {"eprint": self.arxiv, "archivePrefix": "arXiv"}
        fields["url"] = self.url
        lines = [f"  {field} = {{{value}}}," for field, value in fields.items() if value]
        kind = "inproceedings" if name else "misc"
        return "\n".join([f"@{kind}{{{surname.lower()}{self.year}{self.key.replace('-', '')},", *lines, "}"])


def _surname(author: str) -> str:
    return author.split()[-1]


def _given(author: str) -> str:
    return " ".join(author.split()[:-1])


PAPERS = (
    Citation(
        "ecoflap",
        "ECoFLaP: Efficient Coarse-to-Fine Layer-Wise Pruning for Vision-Language Models",
        ("Yi-Lin Sung", "Jaehong Yoon", "Mohit Bansal"),
        2023,
        "ICLR 2024",
        "2310.02998",
    ),
    Citation(
        "mezo",
        "Fine-Tuning Language Models with Just Forward Passes",
        (
            "Sadhika Malladi",
            "Tianyu Gao",
            "Eshaan Nichani",
            "Alex Damian",
            "Jason D. Lee",
            "Danqi Chen",
            "Sanjeev Arora",
        ),
        2023,
        "NeurIPS 2023",
        "2305.17333",
    ),
    Citation(
        "wanda",
        "A Simple and Effective Pruning Approach for Large Language Models",
        ("Mingjie Sun", "Zhuang Liu", "Anna Bair", "J. Zico Kolter"),
        2023,
        "ICLR 2024",
        "2306.11695",
    ),
    Citation(
        "sparsegpt",
        "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot",
        ("Elias Frantar", "Dan Alistarh"),
        2023,
        "ICML 2023",
        "2301.00774",
    ),
    Citation(
        "alps",
        "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language Models",
        ("Xiang Meng", "Kayhan Behdin", "Haoyue Wang", "Rahul Mazumder"),
        2024,
        "NeurIPS 2024",
        "2406.07831",
    ),
    Citation(
        "gptaq",
        "GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric Calibration",
        ("Yuhang Li", "Ruokai Yin", "Donghyun Lee", "Shiting Xiao", "Priyadarshini Panda"),
        2025,
        "ICML 2025",
        "2504.02692",
    ),
    Citation(
        "admm-update",
        "Fast and Effective Weight Update for Pruned Large Language Models",
        ("Vladimír Boža",),
        2024,
        "TMLR 2024",
        "2401.02938",
    ),
    Citation(
        "magnitude",
        "Learning both Weights and Connections for Efficient Neural Networks",
        ("Song Han", "Jeff Pool", "John Tran", "William J. Dally"),
        2015,
        "NeurIPS 2015",
        "1506.02626",
    ),
    Citation(
        "obd",
        "Optimal Brain Damage",
        ("Yann LeCun", "John S. Denker", "Sara A. Solla"),
        1989,
        "NeurIPS 1989",
        page="https://proceedings.neurips.cc/paper/1989/hash/6c9882bbac1c7093bd25041881277658-Abstract.html",
    ),
    Citation(
        "owl",
        "Outlier Weighed Layerwise Sparsity (OWL): A Missing Secret Sauce for Pruning LLMs to High Sparsity",
        (
            "Lu Yin",
            "You Wu",
            "Zhenyu Zhang",
            "Cheng-Yu Hsieh",
            "Yaqing Wang",
            "Yiling Jia",
            "Gen Li",
            "Ajay Jaiswal",
            "Mykola Pechenizkiy",
            "Yi Liang",
            "Michael Bendersky",
            "Zhangyang Wang",
            "Shiwei Liu",
        ),
        2023,
        "ICML 2024",
        "2310.05175",
    ),
    Citation(
        "alphapruning",
        "AlphaPruning: Using Heavy-Tailed Self Regularization Theory for Improved Layer-wise Pruning of Large "
        "Language Models",
        ("Haiquan Lu", "Yefan Zhou", "Shiwei Liu", "Zhangyang Wang", "Michael W. Mahoney", "Yaoqing Yang"),
        2024,
        "NeurIPS 2024",
        "2410.10912",
    ),
    Citation(
        "dlp",
        "DLP: Dynamic Layerwise Pruning in Large Language Models",
        ("Yuli Chen", "Bo Cheng", "Jiale Han", "Yingying Zhang", "Yingting Li", "Shuhao Zhang"),
        2025,
        "ICML 2025",
        "2505.23807",
    ),
    Citation(
        "forward-mode",
        "Gradients without Backpropagation",
        ("Atılım Güneş Baydin", "Barak A. Pearlmutter", "Don Syme", "Frank Wood", "Philip Torr"),
        2022,
        arxiv="2202.08587",
    ),
    Citation(
        "evopress",
        "EvoPress: Accurate Dynamic Model Compression via Evolutionary Search",
        ("Oliver Sieberling", "Denis Kuznedelev", "Eldar Kurtic", "Dan Alistarh"),
        2024,
        "ICML 2025",
        "2410.14649",
    ),
    Citation(
        "upop",
        "UPop: Unified and Progressive Pruning for Compressing Vision-Language Transformers",
        ("Dachuan Shi", "Chaofan Tao", "Ying Jin", "Zhendong Yang", "Chun Yuan", "Jiaqi Wang"),
        2023,
        "ICML 2023",
        "2301.13741",
    ),
    Citation(
        "tamp",
        "TAMP: Token-Adaptive Layerwise Pruning in Multimodal Large Language Models",
        ("Jaewoo Lee", "Keyang Xuan", "Chanakya Ekbote", "Sandeep Polisetty", "Yi R. Fung", "Paul Pu Liang"),
        2025,
        "Findings of ACL 2025",
        "2504.09897",
    ),
    Citation(
        "atv-pruning",
        "Mostly Text, Smart Visuals: Asymmetric Text-Visual Pruning for Large Vision-Language Models",
        ("Sijie Li", "Biao Qian", "Jungong Han"),
        2026,
        "CVPR 2026",
        "2603.16001",
    ),
    Citation(
        "landscape",
        "Visualizing the Loss Landscape of Neural Nets",
        ("Hao Li", "Zheng Xu", "Gavin Taylor", "Christoph Studer", "Tom Goldstein"),
        2017,
        "NeurIPS 2018",
        "1712.09913",
    ),
)
