/**
 * What the tests in virtual time share: the switch between few and many, and two who talk.
 *
 * @module
 */
import process from "node:process";
import { join, login, type Player, type PlayerOptions, type World } from "./scenario.ts";

/** With PUNCH_FULL=1 tests take all their seeds and datagrams; without it, a sample that takes a moment. */
const FULL = process.env["PUNCH_FULL"] === "1";
/** How many: all of them with PUNCH_FULL=1, else some. */
export const many = (all: number, some: number) => FULL ? all : some;
/** For the few tests that take minutes with PUNCH_FULL=1: runners give up sooner. */
export const LONG = { timeout: 900_000 };

/** Alice and bob, logged in and at rest. */
export function pair(world: World, one: PlayerOptions, other: PlayerOptions): [Player, Player] {
  const alice = join(world, "alice", one), bob = join(world, "bob", other);
  login(world, alice, bob);
  world.net.run(1_000);
  return [alice, bob];
}

/** What somebody has been told, by that peer or by anybody. */
export const texts = (player: Player, from?: string) =>
  player.events("message").filter((message) => !from || message.from === from).map(({ text }) => text);

/** Texts to send: "m 0", "m 1" and so on. */
export const numbered = (count: number, what = "m ") => Array.from({ length: count }, (_, i) => `${what}${i}`);
