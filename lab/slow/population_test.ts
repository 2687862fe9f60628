/**
 * The population in small: 300 pairs must do as well as theory says, and the models of the others as published.
 *
 * @module
 */
import assert from "node:assert/strict";
import { test } from "node:test";
import { drawPair, MIX } from "../mix.ts";
import { picture, population, report, type Result, runPair, summarize, SYSTEMS } from "../population.ts";
import { headline, limit, type Model, MODELS } from "../rivals.ts";

const PAIRS = 300, SEED = "test";
let results: Result[] = [];

test("the classes of the mix add up to 100 %", () => {
  const sum = MIX.reduce((all, { percent }) => all + percent, 0);
  assert.ok(Math.abs(sum - 100) < 1e-9, `${sum}`);
});

test("drawPair() draws the classes by their shares, and each pair from the seed and its number alone", () => {
  assert.deepEqual(drawPair(SEED, 7), drawPair(SEED, 7));
  const sites = Array.from({ length: 10_000 }, (_, index) => drawPair(SEED, index).sites).flat();
  for (const kind of MIX) {
    const drawn = 100 * sites.filter((site) => site.kind === kind).length / sites.length;
    assert.ok(Math.abs(drawn - kind.percent) < 1.2, `${kind.name}: ${drawn}`);
  }
});

const HEADLINES: [string, number][] = [["hyperdht", 0.971], ["frp", 0.946], ["ICE", 0.755], ["Tailscale", 0.755]];
const model = (name: string): Model => MODELS.find((one) => one.name.startsWith(name))!;
for (const [name, published] of HEADLINES) {
  test(`headline() of ${name} is the published ${published}`, () => {
    assert.ok(Math.abs(headline(model(name)) - published) < 0.002, `${headline(model(name))}`);
  });
}

test("limit() is the 97.2 % that theory allows", () => assert.ok(Math.abs(limit() - 0.972) < 0.001, `${limit()}`));

test(`${PAIRS} pairs: at least 95 % of those with UDP are direct, and every message is delivered, once`, () => {
  results = population(PAIRS, SEED);
  const capable = results.filter(({ pair }) => pair.isCapable),
    possible = capable.filter(({ pair }) => pair.isPossible);
  const [ours] = summarize(results);
  assert.ok(ours!.directOfCapable >= 0.95, `${ours!.directOfCapable}`);
  assert.equal(ours!.deliveredOfCapable, 1);
  const late = possible.filter(({ run }) => run.directMs > 15_000).map(({ pair }) => pair.index);
  assert.ok(late.length <= 0.01 * possible.length, `not direct: ${late}`);
  assert.equal(results.filter(({ run }) => run.duplicates > 0).length, 0);
});

test("users without UDP get nothing through, and the table says so", () => {
  const blocked = results.filter(({ pair }) => !pair.isCapable);
  assert.ok(blocked.length > 0);
  for (const { run } of blocked) assert.deepEqual([run.isIn, run.delivered, run.directMs], [false, 0, Infinity]);
  assert.match(report(results, SEED), /UDP-blocked side cannot be delivered/);
});

test("punch is ahead of every model: of more pairs direct, sooner, with the first message sooner", () => {
  const [ours, ...others] = summarize(results);
  for (const row of others) {
    assert.ok(ours!.directOfCapable >= row.directOfCapable, row.name);
    assert.ok(ours!.direct[0]! < row.direct[0]!, row.name);
    assert.ok(ours!.message[0]! < row.message[0]!, row.name);
  }
});

test("runPair() does the same again", () => {
  for (const { pair, run } of results.slice(0, 5)) assert.deepEqual(runPair(SEED, drawPair(SEED, pair.index)), run);
});

test("picture() is well-formed, under 40 KB, and needs nothing from elsewhere", () => {
  const svg = picture(results), open: string[] = [];
  assert.ok(svg.length < 40_000, `${svg.length}`);
  for (const [, close, name, empty] of svg.matchAll(/<(\/?)([a-z]+)(?:\s+[a-zA-Z-]+="[^"<]*")*\s*(\/?)>/g)) {
    if (close) assert.equal(open.pop(), name);
    else if (!empty) open.push(name!);
  }
  assert.deepEqual(open, []);
  assert.equal(svg.match(/</g)!.length, svg.match(/<\/?[a-z]+(?:\s+[a-zA-Z-]+="[^"<]*")*\s*\/?>/g)!.length);
  assert.doesNotMatch(svg, /NaN|undefined|Infinity|&(?!amp;|lt;|gt;)/);
  assert.doesNotMatch(svg.replace('xmlns="http://www.w3.org/2000/svg"', ""), /https?:|url\(|@import|href/);
  for (const { name } of SYSTEMS) assert.ok(svg.includes(`>${name}<`), name);
});
