/**
 * No behaviour has changed that the worlds of `worlds.ts` can see: their hashes are those of `oracle.json`.
 *
 * @module
 */
import assert from "node:assert/strict";
import { test } from "node:test";
import { expected, hashOf, namesWith } from "./oracle.ts";

const right = expected(), names = namesWith([]);
const HELP =
  `Look closer: deno run -A lab/oracle.ts --against ANOTHER_CHECKOUT, or --log NAME; if it is meant to be so: ` +
  `deno run -A lab/oracle.ts --update, and say why in the commit`;

test("the oracle knows all worlds, and no other ones", () => {
  assert.deepEqual(Object.keys(right).sort(), names.sort(), HELP);
});

test(`all effects of ${names.length} worlds are what they were`, { timeout: 600_000 }, () => {
  const differ = names.filter((name) => hashOf(name) !== right[name]);
  assert.deepEqual(differ, [], `${differ.length} worlds differ: ${differ.join("; ")}. ${HELP}`);
});
