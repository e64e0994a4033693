"""Labels that packages compute from a molecule or a protein alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from tagllm.errors import UserError

RESIDUES = frozenset("ACDEFGHIKLMNPQRSTVWY")
"""The twenty standard ones."""


class DrugLikeness(NamedTuple):
    """`canonical`: rdkit's own SMILES of the molecule. `qed`: 0 to 1 (Bickerton et al. 2012)."""

    canonical: str
    qed: float


def drug_likeness(smiles: str) -> DrugLikeness | None:
    """None where rdkit cannot parse it."""
    from rdkit import Chem, rdBase
    from rdkit.Chem import QED

    qed: Callable[[Chem.Mol], float] = QED.qed
    with rdBase.BlockLogs():
        molecule: Chem.Mol | None = Chem.MolFromSmiles(smiles)
        return DrugLikeness(Chem.MolToSmiles(molecule), qed(molecule)) if molecule is not None else None


def protein_labels(recipe: str, sequence: str) -> dict[str, Any]:
    """The descriptor of the paper, and the isoelectric point (pH); letters other than `RESIDUES` have no properties
    there and count as residues all the same.

    The authors' code takes the first descriptor of `peptides` 0.3.2, which is BLOSUM1 (Georgiev 2009); later versions
    have others before it.

    Raises:
        UserError: it is not installed.
    """
    try:
        from peptides import Peptide
    except ImportError:
        raise UserError(
            f"recipe {recipe}: package peptides is not installed; it computes the labels. "
            "Run: pip install peptides==0.5.0"
        ) from None
    protein = Peptide(sequence)
    return {
        "descriptor": float(protein.descriptors()["BLOSUM1"]),
        "isoelectric_point": float(protein.isoelectric_point()),
    }
