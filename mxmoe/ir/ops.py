"""The ops of the dialect, at columnar grain: one op per (block, bank, role), one table row per expert."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from xdsl.dialects.builtin import ArrayAttr, DictionaryAttr, FloatAttr, IntegerAttr, StringAttr, TensorType, i64
from xdsl.ir import Attribute, Dialect, SSAValue
from xdsl.irdl import (
    irdl_op_definition,
    operand_def,
    opt_prop_def,
    prop_def,
    region_def,
    result_def,
    traits_def,
    var_operand_def,
    var_result_def,
)
from xdsl.parser import Parser
from xdsl.traits import IsTerminator, Pure
from xdsl.utils.exceptions import VerifyException

from mxmoe.ir.attrs import RoutingType, SchemeAttr, TableAttr, TileAttr
from mxmoe.ir.chains import verify_chains
from mxmoe.ir.format import (
    ReadableOp,
    list_of,
    parse_dict,
    parse_int,
    parse_scheme,
    parse_table,
    parse_text,
    parse_tile,
)
from mxmoe.ir.scheme import Scheme
from mxmoe.ir.stages import Stage, verify_block
from mxmoe.ir.table import Table
from mxmoe.ir.tile import Tile

Readers = dict[str, Callable[[Parser], Attribute]]


class _WithTables(ReadableOp):
    """Plain-Python access to properties: `Table`, `int` and `str` in place of attributes that wrap them."""

    def _table(self, key: str) -> Table | None:
        attribute = self.properties.get(key)
        return attribute.data if isinstance(attribute, TableAttr) else None

    def _text(self, key: str) -> str:
        attribute = self.properties[key]
        assert isinstance(attribute, StringAttr), f"{self.name}.{key} is {attribute}"
        return attribute.data

    def _int(self, key: str) -> int:
        attribute = self.properties[key]
        assert isinstance(attribute, IntegerAttr), f"{self.name}.{key} is {attribute}"
        return attribute.value.data

    def set_table(self, key: str, table: Table | None) -> None:
        """Set the table property `key`, or take it away with None."""
        if table is None:
            self.properties.pop(key, None)
        else:
            self.properties[key] = TableAttr(table)


def _width(value: SSAValue) -> int:
    kind = value.type
    assert isinstance(kind, TensorType), f"{value} is no tensor"
    return kind.get_shape()[-1]


@irdl_op_definition
class RouteOp(_WithTables):
    """Dispatch: takes tokens [tokens, hidden], gives one row per assignment [assignments, hidden] and the routing."""

    name = "mxmoe.route"
    READERS: ClassVar[Readers] = {
        "bank": parse_text,
        "experts": parse_int,
        "top_k": parse_int,
        "frequency": parse_table,
        "mass": parse_table,
        "kept": parse_table,
    }
    hidden_states = operand_def(TensorType)
    rows = result_def(TensorType)
    routing = result_def(RoutingType)
    bank_ = prop_def(StringAttr, prop_name="bank")
    experts_ = prop_def(IntegerAttr, prop_name="experts")
    top_k_ = prop_def(IntegerAttr, prop_name="top_k")
    frequency_ = opt_prop_def(TableAttr, prop_name="frequency")
    mass_ = opt_prop_def(TableAttr, prop_name="mass")
    kept_ = opt_prop_def(TableAttr, prop_name="kept")
    traits = traits_def(Pure())

    @property
    def bank(self) -> str:
        """`routed` or `shared`."""
        return self._text("bank")

    @property
    def experts(self) -> int:
        """Number of experts in the bank; 1 for shared."""
        return self._int("experts")

    @property
    def top_k(self) -> int:
        """Assignments per token."""
        return self._int("top_k")

    @property
    def frequency(self) -> Table | None:
        """[expert], mean assignments per token; sums to top_k where no padding occurs."""
        return self._table("frequency")

    @property
    def mass(self) -> Table | None:
        """[expert], mean router weight per token."""
        return self._table("mass")

    @property
    def kept(self) -> Table | None:
        """[expert], number that each had before experts without bits were dropped; None where none was."""
        return self._table("kept")


class _Gemm(_WithTables):
    """What `linear` and `group_gemm` share."""

    @property
    def route(self) -> RouteOp:
        """The op that dispatched this op's rows."""
        owner = self.operands[1].owner
        assert isinstance(owner, RouteOp), f"{self.name} takes its routing from {owner}"
        return owner

    @property
    def bank_name(self) -> str:
        """`routed` or `shared`."""
        return self.route.bank

    @property
    def experts(self) -> int:
        """Number of rows of every table of this op."""
        return self.route.experts

    @property
    def role(self) -> str:
        """Gate, up or down; gate_up for a fused pair."""
        return self._text("role")

    @property
    def k(self) -> int:
        """Input channels."""
        return _width(self.operands[0])

    @property
    def n(self) -> int:
        """Output channels of one weight."""
        return _width(self.results[0])

    @property
    def choice(self) -> Table | None:
        """[expert], index into the block's candidates."""
        return self._table("choice")


@irdl_op_definition
class LinearOp(_Gemm):
    """One role of one bank: rows [assignments, k] times each expert's weight [n, k], to [assignments, n]."""

    name = "mxmoe.linear"
    READERS: ClassVar[Readers] = {
        "role": parse_text,
        "weight": parse_text,
        "bias": parse_text,
        "sensitivity": parse_table,
        "cost": parse_table,
        "choice": parse_table,
    }
    rows = operand_def(TensorType)
    routing = operand_def(RoutingType)
    out = result_def(TensorType)
    role_ = prop_def(StringAttr, prop_name="role")
    weight_ = prop_def(StringAttr, prop_name="weight")
    bias_ = opt_prop_def(StringAttr, prop_name="bias")
    sensitivity_ = opt_prop_def(TableAttr, prop_name="sensitivity")
    cost_ = opt_prop_def(TableAttr, prop_name="cost")
    choice_ = opt_prop_def(TableAttr, prop_name="choice")
    traits = traits_def(Pure())

    @property
    def weight(self) -> str:
        """Name of the weights [experts, n, k]; the tensor itself is never in the IR."""
        return self._text("weight")

    @property
    def bias(self) -> str | None:
        """Name of the bias [experts, n], if there is one."""
        return self._text("bias") if "bias" in self.properties else None

    @property
    def sensitivity(self) -> Table | None:
        """[expert, scheme], change of the block output when only this linear is quantized so."""
        return self._table("sensitivity")

    @property
    def cost(self) -> Table | None:
        """[expert, scheme], microseconds on the planned device; inf where the scheme cannot run."""
        return self._table("cost")


@irdl_op_definition
class ActOp(_WithTables):
    """
    The nonlinearity: (gate, up) to kind(gate) * up, or kind(up) where experts have no gate; then perhaps a rotation.

    With `hadamard=128` every 128 channels of a row are multiplied by the normalised Hadamard matrix of this size, and
    the weights of down that the module names are rotated along their input channels alike (`mxmoe.quant.rotate`), so
    that their product is what it was.
    """

    name = "mxmoe.act"
    READERS: ClassVar[Readers] = {"kind": parse_text, "params": parse_dict, "hadamard": parse_int}
    inputs = var_operand_def(TensorType)
    out = result_def(TensorType)
    kind_ = prop_def(StringAttr, prop_name="kind")
    params_ = opt_prop_def(DictionaryAttr, prop_name="params")
    hadamard_ = opt_prop_def(IntegerAttr, prop_name="hadamard")
    traits = traits_def(Pure())

    @property
    def kind(self) -> str:
        """Name of the function, e.g. silu."""
        return self._text("kind")

    @property
    def params(self) -> dict[str, float]:
        """Named numbers the function takes, e.g. a limit."""
        attribute = self.properties.get("params")
        if not isinstance(attribute, DictionaryAttr):
            return {}
        return {key: value.value.data for key, value in attribute.data.items() if isinstance(value, FloatAttr)}

    @property
    def hadamard(self) -> int:
        """Channels that are rotated together on their way to down; 0: none are."""
        return self._int("hadamard") if "hadamard" in self.properties else 0

    @hadamard.setter
    def hadamard(self, block: int) -> None:
        if block:
            self.properties["hadamard"] = IntegerAttr(block, i64)
        else:
            self.properties.pop("hadamard", None)


@irdl_op_definition
class CombineOp(_WithTables):
    """Weighs each assignment's row with its router weight and adds a token's rows up: [tokens, hidden]."""

    name = "mxmoe.combine"
    rows = operand_def(TensorType)
    routing = operand_def(RoutingType)
    out = result_def(TensorType)
    traits = traits_def(Pure())


@irdl_op_definition
class GroupGemmOp(_Gemm):
    """
    One launch over all experts of a bank, each with its own scheme and tile.

    A fused gate_up has two weights, one shared choice, and two results in the order of the weights.
    """

    name = "mxmoe.group_gemm"
    READERS: ClassVar[Readers] = {
        "role": parse_text,
        "weights": list_of(parse_text),
        "biases": list_of(parse_text),
        "choice": parse_table,
        "tiles": list_of(parse_tile),
        "tile": parse_table,
    }
    rows = operand_def(TensorType)
    routing = operand_def(RoutingType)
    outs = var_result_def(TensorType)
    role_ = prop_def(StringAttr, prop_name="role")
    weights_ = prop_def(ArrayAttr[StringAttr], prop_name="weights")
    biases_ = opt_prop_def(ArrayAttr[StringAttr], prop_name="biases")
    choice_ = prop_def(TableAttr, prop_name="choice")
    tiles_ = opt_prop_def(ArrayAttr[TileAttr], prop_name="tiles")
    tile_ = opt_prop_def(TableAttr, prop_name="tile")
    traits = traits_def(Pure())

    @property
    def weights(self) -> tuple[str, ...]:
        """Names of the weights, in the order of the results."""
        return tuple(name.data for name in self.weights_.data)

    @property
    def biases(self) -> tuple[str, ...]:
        """Names of the biases, in the order of the weights; empty without bias."""
        return tuple(name.data for name in self.biases_.data) if self.biases_ else ()

    @property
    def tiles(self) -> tuple[Tile, ...]:
        """Tiles that `tile` picks from; empty before choose-tiles."""
        return tuple(tile.data for tile in self.tiles_.data) if self.tiles_ else ()

    @property
    def tile(self) -> Table | None:
        """[expert], index into `tiles`."""
        return self._table("tile")


@irdl_op_definition
class YieldOp(_WithTables):
    """Ends a block: its output is the sum of the banks' outputs."""

    name = "mxmoe.yield"
    banks = var_operand_def(TensorType)
    traits = traits_def(IsTerminator())


@irdl_op_definition
class MoeOp(_WithTables):
    """One MoE block: its candidates, its stage, and a region with one chain of ops per bank."""

    name = "mxmoe.moe"
    READERS: ClassVar[Readers] = {
        "block": parse_text,
        "stage": parse_text,
        "candidates": list_of(parse_scheme),
    }
    body = region_def("single_block")
    block_ = prop_def(StringAttr, prop_name="block")
    stage_ = prop_def(StringAttr, prop_name="stage")
    candidates_ = prop_def(ArrayAttr[SchemeAttr], prop_name="candidates")
    traits = traits_def()

    @property
    def block(self) -> str:
        """Path of the block in the model, e.g. model.layers.0.mlp."""
        return self._text("block")

    @property
    def stage(self) -> Stage:
        """How far the block has come: lifted, annotated, allocated or lowered."""
        return self._text("stage")  # pyright: ignore[reportReturnType]  # the verifier admits the four names only

    @stage.setter
    def stage(self, stage: Stage) -> None:
        self.properties["stage"] = StringAttr(stage)

    @property
    def candidates(self) -> tuple[Scheme, ...]:
        """The schemes that every [expert, scheme] table has as its second axis."""
        return tuple(scheme.data for scheme in self.candidates_.data)

    @property
    def hidden(self) -> int:
        """Width of a token."""
        return _width(self.body.block.args[0])

    def verify_(self) -> None:
        """Check the block against the rules of its stage, the chains of its banks, and that its name is its own."""
        try:
            verify_block(self.stage, self.candidates, self.body.block.ops)
            verify_chains(self.body.block)
        except VerifyException as error:
            raise VerifyException(f"block {self.block!r}: {error}") from error
        siblings = self.parent.ops if self.parent else ()
        if sum(isinstance(op, MoeOp) and op.block == self.block for op in siblings) > 1:
            raise VerifyException(f"two blocks are named {self.block!r}")


MXMOE = Dialect(
    "mxmoe",
    [MoeOp, RouteOp, LinearOp, ActOp, CombineOp, GroupGemmOp, YieldOp],
    [SchemeAttr, TableAttr, TileAttr, RoutingType],
)
"""The dialect: everything the parser must know."""
