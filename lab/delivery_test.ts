/**
 * The room `delivery` of client.ts alone: two of them back to back over a `carry` that loses, doubles and reorders,
 * without keys, NATs and servers. Each message is shown once, whole and in order, or told as failed.
 *
 * @module
 */
import assert from "node:assert/strict";
import { test } from "node:test";
import { type ClientEvent, createDelivery, MAX_MESSAGE_BYTES } from "../client.ts";
import { MAX_PART_BYTES, type Peer } from "../protocol.ts";
import { random } from "./network.ts";

type Delivery = ReturnType<typeof createDelivery>;
type Way = Parameters<Delivery["onAck"]>[1];
type Message = Peer & { type: "P2PMESSAGE" };
type Ack = Peer & { type: "P2PMESSAGEACK" };

const START_MS = 1_700_000_000_000, GIVE_UP_MS = 15_000;
const WAYS = ["relay", "path", "both"] as const; // the way in use: they take turns
const LENGTHS = [1, 799, 800, 801, 1_600, 3_000]; // around a part, and several of them
const newWay = (kind: "relay" | "direct") => ({ kind, rtt: { srtt: null, rttvar: 0 } }) as Way;
const utf8 = new TextEncoder();
/** Nothing is lost and nothing overtakes; the relay is the only way. */
const CALM: Conditions = { loss: 0, delayMs: 30, jitter: 0, doubled: 0, switchMs: 1e9 };

interface Conditions {
  loss: number;
  delayMs: number; // at least, one way
  jitter: number; // up to so many times the delay on top, so datagrams overtake each other
  doubled: number; // such a share of all datagrams arrives twice
  switchMs: number; // after so long another way is in use
}

/** Two clients under virtual time, of whom either may be started again. */
function createWorld(seed: string, { loss, delayMs, jitter, doubled, switchMs }: Conditions) {
  const next = random(`delivery ${seed}`);
  let now = START_MS, blackUntil = 0, carried = 0;
  let epoch = 0; // the keys change with each restart: what was sealed before is dropped
  const timers: { at: number; work: () => void }[] = [];
  const later = (ms: number, work: () => void) => void timers.push({ at: now + ms, work });
  const mode = () => WAYS[Math.floor((now - START_MS) / switchMs) % WAYS.length]!;

  function createEnd(name: string, run: number) {
    const stream = `${name}${run}`.padEnd(16, "0"), relay = newWay("relay"), path = newWay("direct");
    const pushed: { id: string; text: string }[] = [],
      shown: typeof pushed = [],
      told: { id: string; ok: boolean }[] = [];
    let hasSession = false, isOpening = false, nextSeq = 0;
    const way = () => mode() === "relay" ? relay : path;
    const viaOf = (kind: Way["kind"]) => kind === "relay" ? relay : path;
    const io = {
      get now() {
        return now;
      },
      emit(event: ClientEvent) {
        if (event.event === "message") shown.push(event);
        else if (event.event === "sent") told.push(event);
      },
    };
    const delivery = createDelivery(io, { name: "", relay, way, hasSession: () => hasSession }, stream, {
      carry(frame, isLate) {
        if (!hasSession) return null;
        for (const over of isLate && mode() !== "relay" ? [path, relay] : waysInUse()) cast(frame, over);
        return way();
      },
      needSession: () => void (hasSession || isOpening || openSession(1)),
      talk: () => {},
      progress: () => {},
    });

    const waysInUse = () => mode() === "both" ? [path, relay] : [way()];
    const other = () => name === "alice" ? bob() : alice;
    const isGone = () => name === "bob" && end !== bob();

    /** To whoever is at the other end when it arrives. */
    function travel(work: () => void): void {
      for (let copies = next() < doubled ? 2 : 1; copies > 0; copies--) {
        if (next() >= loss && now >= blackUntil) later(delayMs * (1 + jitter * next()), work);
      }
    }

    function cast(frame: Peer, { kind }: Way): void {
      if (frame.type === "P2PMESSAGE") carried++;
      const sealed = epoch;
      travel(() => sealed === epoch && other().hasSession() && other().receive(frame, kind));
    }

    function receive(frame: Peer, kind: Way["kind"]): void {
      const back = (ack: Peer) => {
        for (const over of mode() === "relay" ? waysInUse() : [viaOf(kind)]) cast(ack, over);
        return hasSession;
      };
      if (frame.type === "P2PMESSAGE") delivery.onPart(frame, { kind, stream: other().stream, back });
      if (frame.type === "P2PMESSAGEACK") delivery.onAck(frame, viaOf(kind));
      delivery.wake();
    }

    // The handshake of `channel` in two messages. The first one takes our oldest part along.

    function openSession(tries: number, part = delivery.oldestPart()): void {
      const begun = epoch;
      if (tries === 1) delivery.onHandshake();
      isOpening = true;
      travel(() => begun === epoch && other().onFirst(part));
      later(400 * tries, () => {
        if (begun === epoch && isOpening && !isGone()) openSession(tries + 1, part);
      });
    }

    function onFirst(part: Message | null): void {
      const begun = epoch;
      gotSession(now);
      travel(() => begun === epoch && other().onSecond());
      if (part) receive(part, "relay");
      else delivery.acknowledge((ack) => (cast(ack, relay), true));
    }

    function onSecond(): void {
      if (!isOpening) return;
      gotSession(now + 400);
      delivery.owesAck();
      if (delivery.isAckDue()) delivery.acknowledge((ack) => (cast(ack, way()), true));
      delivery.wake();
    }

    function gotSession(handshakeDueAt: number): void {
      if (isOpening) delivery.onHandshakeOver(handshakeDueAt);
      isOpening = false;
      hasSession = true;
      delivery.openStream(other().stream);
    }

    function push(text: string): void {
      nextSeq += Math.ceil(text.length / MAX_PART_BYTES);
      pushed.push({ id: `${stream.slice(0, 8)}-${nextSeq - 1}`, text });
      delivery.push(utf8.encode(text));
    }

    const end = {
      stream,
      delivery,
      pushed,
      shown,
      told,
      push,
      receive,
      onFirst,
      onSecond,
      hasSession: () => hasSession,
      loseSession(): void { // the other one was started again
        if (isOpening) delivery.onHandshakeOver(now);
        hasSession = isOpening = false;
      },
    };
    return end;
  }

  const alice = createEnd("alice", 1), bobs = [createEnd("bob", 1)], bob = () => bobs.at(-1)!; // who runs now

  function wakeAll(): void {
    for (const { delivery } of [alice, bob()]) {
      delivery.giveUp(() => "timeout");
      delivery.wake();
      assert.ok(delivery.wakeAt() > now, `${seed}: wakeAt lies ${now - delivery.wakeAt()} ms back after wake`);
    }
  }

  function onSwitch(): void { // as `createConversation` does: what may be lost on the old way goes by the new one
    for (const { delivery } of [alice, bob()]) {
      if (mode() === "both") delivery.resendInFlight();
      else delivery.resend(mode() === "path" ? now - 200 : Infinity);
    }
    later(switchMs, onSwitch);
  }
  later(switchMs, onSwitch);

  return {
    alice,
    bobs,
    bob,
    later,
    next,
    now: () => now,
    carried: () => carried,
    blackOut: (ms: number) => void (blackUntil = now + ms),
    restart(): void {
      epoch++;
      bobs.push(createEnd("bob", bobs.length + 1));
      alice.loseSession();
    },
    isQuiet: () => alice.delivery.isIdle() && bob().delivery.isIdle(),
    /** Until that holds, at most so long. */
    run(until: () => boolean, limitMs = 180_000): void {
      for (const end = now + limitMs; !until() && now < end;) {
        const wakes = [alice, bob()].map(({ delivery }) => delivery.wakeAt());
        now = Math.max(now, Math.min(end, ...wakes, ...timers.map(({ at }) => at)));
        for (const due of timers.filter(({ at }) => at <= now).sort((a, b) => a.at - b.at)) {
          timers.splice(timers.indexOf(due), 1);
          due.work();
        }
        wakeAll();
      }
    },
  };
}
type World = ReturnType<typeof createWorld>;
type End = World["alice"];

/** Each run of a client has shown whole messages of the other one, in order, none of them twice. */
function checkShown(from: End[], to: End[], where: string): void {
  const sent = from.flatMap(({ pushed }) => pushed);
  for (const { shown } of to) {
    const places = shown.map(({ id, text }) => sent.findIndex((one) => one.id === id && one.text === text));
    assert.ok(places.every((place, i) => place > (places[i - 1] ?? -1)), `${where}: shown ${places}`);
  }
}

/** Whoever still runs was told once of each message what became of it, and what was told as sent has been shown. */
function checkTold(from: End, to: End[], where: string): void {
  assert.deepEqual(from.told.map(({ id }) => id).sort(), from.pushed.map(({ id }) => id).sort(), `${where}: told once`);
  const shown = new Set(to.flatMap(({ shown }) => shown.map(({ id }) => id)));
  for (const { id, ok } of from.told) assert.ok(!ok || shown.has(id), `${where}: ${id} is told as sent`);
}

const dice = (seed: string): Conditions => {
  const next = random(`conditions ${seed}`), [loss, delayMs, doubled, switchMs] = [next(), next(), next(), next()];
  return {
    loss: 0.3 * loss,
    delayMs: 5 + 80 * delayMs,
    jitter: 2,
    doubled: 0.2 * doubled,
    switchMs: 200 + 2_000 * switchMs,
  };
};

/** A message for each side at some time; one in fifty is as long as a message may be. */
function talk({ alice, bob, next, later }: World, count: number, withinMs: number): void {
  for (let i = 0; i < count; i++) {
    const length = () => next() < 0.02 ? MAX_MESSAGE_BYTES : LENGTHS[Math.floor(LENGTHS.length * next())]!;
    const aliceBytes = length(), bobBytes = length();
    later(withinMs * next(), () => alice.push(`a${i} `.padEnd(aliceBytes, "x").slice(0, aliceBytes)));
    later(withinMs * next(), () => bob().push(`b${i} `.padEnd(bobBytes, "x").slice(0, bobBytes)));
  }
}

test("500 lines that lose, double and reorder show each message once, whole and in order, both ways", () => {
  for (let seed = 0; seed < 500; seed++) {
    const world = createWorld(`line ${seed}`, dice(`line ${seed}`)), { alice, bob } = world;
    const where = `seed ${seed}`;
    talk(world, 6, 3_000);
    world.run(() => alice.pushed.length === 6 && bob().pushed.length === 6 && world.isQuiet());
    assert.deepEqual(bob().shown.map(({ text }) => text), alice.pushed.map(({ text }) => text), where);
    assert.deepEqual(alice.shown.map(({ text }) => text), bob().pushed.map(({ text }) => text), where);
    assert.ok([...alice.told, ...bob().told].every(({ ok }) => ok), `${where}: nothing fails`);
    checkTold(alice, [bob()], where);
    checkTold(bob(), [alice], where);
    world.run(() => false, 60_000);
    assert.ok(world.isQuiet() && alice.delivery.wakeAt() === Infinity && alice.told.length === 6, `${where}: at rest`);
  }
});

test("through restarts, blackouts and failures a message is shown in order or told as failed", () => {
  for (let seed = 0; seed < 500; seed++) {
    const world = createWorld(`break ${seed}`, dice(`break ${seed}`)), { alice, bobs, next, later } = world;
    const where = `seed ${seed}`, isLong = seed % 3 === 0, hasFailure = seed % 7 === 0;
    talk(world, 10, 8_000);
    if (seed % 2 === 0) later(5_000 * next(), () => world.blackOut(isLong ? GIVE_UP_MS + 5_000 * next() : 4_000));
    if (seed % 4 !== 2) later(6_000 * next(), world.restart);
    if (seed % 5 === 0) later(8_000 * next(), world.restart);
    if (hasFailure) later(8_000 * next(), () => alice.delivery.failAll("offline"));
    world.run(() => world.now() > START_MS + 8_000 && world.isQuiet());
    checkShown([alice], bobs, where);
    checkShown(bobs, [alice], where);
    checkTold(alice, bobs, where);
    checkTold(world.bob(), [alice], where);
    const mayFail = hasFailure || (isLong && seed % 2 === 0);
    assert.ok(mayFail || alice.told.every(({ ok }) => ok), `${where}: nothing fails without need`);
  }
});

test("what is given up holds nobody up: the next message arrives, and only what was given up is missing", () => {
  for (let seed = 0; seed < 50; seed++) {
    const world = createWorld(`gap ${seed}`, { ...dice(`gap ${seed}`), loss: 0.1 }), { alice, bob } = world;
    alice.push("before");
    world.run(world.isQuiet);
    world.blackOut(GIVE_UP_MS + 5_000);
    alice.push("lost".padEnd(5_000));
    world.run(world.isQuiet);
    alice.push("lost too".padEnd(2_000));
    alice.delivery.failAll("offline");
    world.run(() => false, 10_000);
    alice.push("after");
    world.run(world.isQuiet);
    assert.deepEqual(alice.told.map(({ ok }) => ok), [true, false, false, true], `seed ${seed}`);
    assert.deepEqual(bob().shown.map(({ text }) => text), ["before", "after"], `seed ${seed}`);
  }
});

test("a message fails after 15 s without an acknowledgement, not counting the time that a clock jumped", () => {
  for (const jumps of [false, true]) {
    const world = createWorld(`give-up ${jumps}`, { ...CALM, loss: 1 }),
      { alice } = world;
    alice.push("lost");
    if (jumps) world.later(10_000, alice.delivery.onJump);
    world.run(() => alice.told.length > 0);
    assert.equal(world.now() - START_MS, GIVE_UP_MS + (jumps ? 10_000 : 0));
  }
});

test("on a line where nothing is lost no part is sent twice", () => {
  for (const bytes of [1, MAX_PART_BYTES, 20_000, MAX_MESSAGE_BYTES]) {
    const world = createWorld(`calm ${bytes}`, CALM), { alice } = world;
    alice.push("opens the session"); // its part travels in the handshake
    world.run(world.isQuiet);
    for (let i = 0; i < 3; i++) alice.push("x".repeat(bytes));
    world.run(world.isQuiet);
    assert.equal(world.carried(), 3 * Math.ceil(bytes / MAX_PART_BYTES), `${bytes} bytes`);
  }
});

test("no text is no message", () => {
  const { alice } = createWorld("nothing", CALM);
  alice.push("");
  assert.ok(
    alice.delivery.isIdle() && !alice.delivery.hasSent() && alice.delivery.wakeAt() === Infinity &&
      alice.told.length === 0,
  );
});

/** One delivery whose peer is the test. Its clock starts at 0 in `io.now`. */
function createLone({ srtt, rttvar }: { srtt: number | null; rttvar: number } = { srtt: 100, rttvar: 10 }) {
  const shown: string[] = [], told: (ClientEvent & { event: "sent" })[] = [], acks: Ack[] = [];
  const frames: { seq: number; base: number; at: number; isLate: boolean }[] = [];
  const calls = { needSession: 0, talk: 0, progress: 0 };
  const relay = { kind: "relay", rtt: { srtt, rttvar } } as Way;
  const io = {
    now: 0,
    hasSession: true,
    emit(event: ClientEvent): void {
      if (event.event === "message") shown.push(event.text);
      else if (event.event === "sent") told.push(event);
    },
  };
  const context = { name: "peer", relay, way: () => relay, hasSession: () => io.hasSession };
  const delivery = createDelivery(io, context, "0".repeat(16), {
    carry(frame, isLate) {
      const { seq, base } = frame as Message;
      if (io.hasSession) frames.push({ seq, base, at: io.now, isLate });
      return io.hasSession ? relay : null;
    },
    needSession: () => void calls.needSession++,
    talk: () => void calls.talk++,
    progress: () => void calls.progress++,
  });
  return {
    delivery,
    shown,
    told,
    acks,
    frames,
    calls,
    relay,
    io,
    /** So many parts, each of them a message; at that time. */
    push(count: number, at = io.now): void {
      io.now = at;
      for (let i = 0; i < count; i++) delivery.push(new Uint8Array(1));
    },
    /** The peer has all before `next`, and those of `arrived`. */
    ack(next: number, arrived: Record<number, number> = {}, { from = Math.max(0, next - 64), via = relay } = {}): void {
      const states = new Uint8Array(32);
      for (const [seq, kind] of Object.entries(arrived)) {
        states[(Number(seq) - from) >> 2]! |= kind << 2 * ((Number(seq) - from) & 3);
      }
      delivery.onAck({ type: "P2PMESSAGEACK", next, from, states }, via);
    },
    part(fields: Partial<Message>, { kind = "relay" as "relay" | "direct" | "lan", stream = "s" } = {}): void {
      const frame: Message = { type: "P2PMESSAGE", seq: 0, base: 0, left: 0, part: new Uint8Array(1), ...fields };
      delivery.onPart(frame, { kind, stream, back: (ack) => acks.push(ack) > 0 });
    },
    /** What leaves when it is woken then. */
    sentAt(at: number): number[] {
      io.now = at;
      frames.length = 0;
      delivery.wake();
      return frames.map(({ seq }) => seq);
    },
  };
}

// -- what comes in

test("an acknowledgement says of each part around the next one by which way its first copy came", () => {
  const { delivery, acks, part } = createLone();
  delivery.openStream("s");
  part({ seq: 0 });
  part({ seq: 2 }, { kind: "direct" });
  part({ seq: 5 }, { kind: "lan" });
  part({ seq: 5 }); // a second copy
  const states = (...first: number[]) => Object.assign(new Uint8Array(32), first);
  assert.deepEqual(acks.at(-1), { type: "P2PMESSAGEACK", next: 1, from: 0, states: states(0b10_00_01, 0b11_00) });
  for (let seq = 0; seq < 100; seq++) part({ seq });
  part({ seq: 101 }, { kind: "direct" });
  part({ seq: 163 }, { kind: "lan" });
  part({ seq: 164 }); // the first one that does not fit
  const { next, from, states: late } = acks.at(-1)!;
  assert.deepEqual([next, from], [100, 36]);
  assert.deepEqual(late, states(...Array(16).fill(0b01_01_01_01), 0b10_00, ...Array(14).fill(0), 0b11_00_00_00));
});

test("only a part of its stream that is new, of the right length and within reach changes anything", () => {
  const full = new Uint8Array(MAX_PART_BYTES);
  const rows: [what: string, fields: Partial<Message>, stream: string][] = [
    ["of another stream", {}, "other"],
    ["before its base", { seq: 0, base: 1 }, "s"],
    ["too long", { part: new Uint8Array(MAX_PART_BYTES + 1) }, "s"],
    ["short, though more follow", { left: 1, part: full.subarray(1) }, "s"],
    ["128 parts ahead", { seq: 128 }, "s"],
  ];
  for (const [what, fields, stream] of rows) {
    const { delivery, shown, acks, calls, part } = createLone();
    assert.ok(!delivery.hasHeard());
    delivery.openStream("s");
    part(fields, { stream });
    assert.deepEqual([shown, acks, calls.talk], [[], [], 0], what);
    part({ seq: 127 });
    assert.deepEqual([acks.length, calls.talk, delivery.hasHeard()], [1, 1, true], what);
  }
});

test("an old part, or a second copy, is acknowledged again and not shown again", () => {
  const { delivery, shown, acks, calls, part } = createLone();
  delivery.openStream("s");
  for (const seq of [0, 0, 2, 2, 1, 0]) part({ seq });
  assert.deepEqual([shown.length, acks.length, calls.talk], [3, 6, 3]);
  delivery.openStream("s"); // the same one: it goes on
  part({ seq: 0 });
  assert.equal(shown.length, 3);
  delivery.openStream("t"); // the peer was started again
  part({ seq: 0 }, { stream: "t" });
  assert.equal(shown.length, 4);
});

test("what was given up is skipped: what has arrived behind it is shown", () => {
  const { delivery, shown, part } = createLone(), text = (what: string) => ({ part: utf8.encode(what) });
  delivery.openStream("s");
  part({ seq: 0, left: 2, part: new Uint8Array(MAX_PART_BYTES) }); // the rest of this message does not come
  part({ seq: 3, ...text("three") });
  assert.deepEqual(shown, []);
  part({ seq: 4, base: 3, ...text("four") });
  assert.deepEqual(shown, ["three", "four"]);
});

test("an acknowledgement that finds no session is owed, and asks for one", () => {
  const { delivery, calls } = createLone();
  delivery.openStream("s");
  delivery.acknowledge(() => false);
  assert.deepEqual([delivery.isAckDue(), calls.needSession], [true, 1]);
  delivery.acknowledge(() => true);
  assert.deepEqual([delivery.isAckDue(), calls.needSession], [false, 1]);
  delivery.owesAck();
  assert.ok(delivery.isAckDue());
});

test("a message of 64 KiB is shown, one byte more is not", () => {
  const full = new Uint8Array(MAX_PART_BYTES), last = Math.floor(MAX_MESSAGE_BYTES / MAX_PART_BYTES);
  for (const more of [0, 1]) {
    const { delivery, shown, part } = createLone();
    delivery.openStream("s");
    for (let seq = 0; seq < last; seq++) part({ seq, left: last - seq, part: full });
    part({ seq: last, part: new Uint8Array(MAX_MESSAGE_BYTES % MAX_PART_BYTES + more) });
    assert.deepEqual(shown.map(({ length }) => length), more ? [] : [MAX_MESSAGE_BYTES]);
    part({ seq: last + 1 });
    assert.equal(shown.at(-1)!.length, 1, "the next one is shown again");
  }
});

test("a peer that sends whatever it likes makes nothing grow", () => {
  const { set } = Map.prototype, next = random("greedy"), full = new Uint8Array(MAX_PART_BYTES);
  const { delivery, shown, acks, part } = createLone();
  let largest = 0;
  Map.prototype.set = function (key, value) {
    const result = set.call(this, key, value);
    largest = Math.max(largest, this.size);
    return result;
  };
  try {
    delivery.openStream("s");
    for (let seq = 0; seq < 5_000; seq++) part({ seq, left: 1, part: full }); // a message without an end
    for (let i = 0, base = 5_000; i < 20_000; i++) {
      base += next() < 0.01 ? Math.floor(50 * next()) : 0;
      part({ base, seq: base + 1 + Math.floor(400 * next()), left: Math.floor(90 * next()), part: full });
    }
  } finally {
    Map.prototype.set = set;
  }
  // All before `next` that an acknowledgement still names, and as many as may come behind it.
  assert.ok(largest > 2 * 64 && largest <= 3 * 64 + 1, `a map of ${largest}`);
  assert.ok(acks.every(({ states, next, from }) => states.length === 32 && next - from <= 64));
  assert.ok(shown.every((text) => text.length <= MAX_MESSAGE_BYTES));
});

// -- what goes out

test("what has arrived is told in order, with how long it took and the way of the first copy", () => {
  const { told, push, ack, delivery, calls, io } = createLone();
  push(4, 30);
  io.now = 100.06;
  ack(0, { 1: 2, 2: 3 });
  assert.deepEqual(told, [], "the first one is missing");
  assert.equal(calls.progress, 1);
  ack(0, { 1: 2, 2: 3 });
  assert.equal(calls.progress, 1, "nothing new");
  ack(1, { 0: 1, 1: 2, 2: 3 });
  ack(3, { 1: 2, 2: 3 }, { from: 1 });
  ack(4, {}, { from: 4 }); // it says no more how: by the way that we sent it
  const rows = [[0, "relay"], [1, "direct"], [2, "lan"], [3, "relay"]] as const;
  const outcome = { event: "sent", to: "peer", ok: true, ms: 70.1 };
  assert.deepEqual(told, rows.map(([seq, path]) => ({ ...outcome, id: `00000000-${seq}`, path })));
  assert.ok(delivery.isIdle() && delivery.hasSent() && delivery.wakeAt() === Infinity);
});

test("an acknowledgement counts its parts from the one that it begins with", () => {
  const { told, push, ack } = createLone();
  push(16);
  ack(8, {}, { from: 8 });
  ack(9, { 8: 2, 10: 3, 15: 3 }, { from: 8 });
  ack(16, { 9: 2, 15: 1 }, { from: 8 });
  const paths = told.slice(8).map(({ path }) => path);
  assert.deepEqual(paths, ["direct", "direct", "lan", "relay", "relay", "relay", "relay", "lan"]);
});

test("an acknowledgement that another one has overtaken takes nothing back", () => {
  const { push, ack, sentAt } = createLone();
  push(3);
  ack(0, { 1: 1, 2: 1 });
  ack(0, { 1: 1 });
  assert.deepEqual([...new Set([...sentAt(200), ...sentAt(1_000)])], [0]);
});

test("an acknowledgement for another part does not count for the one that the peer waits for", () => {
  const { told, push, ack, sentAt } = createLone();
  push(2);
  ack(0, { 1: 1 });
  ack(0);
  assert.deepEqual([told, sentAt(200)], [[], [0]]);
});

test("a part is due again after its time-out, each time later and in more copies", () => {
  const { delivery, frames, push, io } = createLone();
  push(1);
  for (let i = 0; i < 9; i++) {
    io.now = delivery.wakeAt();
    delivery.wake();
  }
  const times = [...new Set(frames.map(({ at }) => at))],
    copies = times.map((at) => frames.filter((f) => f.at === at).length);
  assert.deepEqual(times.slice(1).map((at, i) => at - times[i]!), [
    200,
    200,
    300,
    450,
    675,
    1_012.5,
    1_518.75,
    2_000,
    2_000,
  ]);
  assert.deepEqual(copies, [1, 1, 2, 3, 4, 4, 4, 4, 4, 4]);
  assert.ok(frames.every(({ at, isLate }) => isLate === at > 0));
});

test("the last part is due after twice the round trip, within bounds; those before it after 200 ms at least", () => {
  const rows: [srtt: number | null, rttvar: number, tailMs: number][] = [
    [null, 0, 400],
    [5, 0, 20],
    [30, 1, 60],
    [30, 10, 70],
    [1_500, 100, 2_000],
  ];
  for (const [srtt, rttvar, tailMs] of rows) {
    const { delivery, push } = createLone({ srtt, rttvar });
    push(1);
    assert.equal(delivery.wakeAt(), tailMs, `${srtt} ms`);
  }
  const { delivery, sentAt } = createLone({ srtt: 30, rttvar: 1 });
  delivery.push(new Uint8Array(2_000));
  assert.deepEqual([sentAt(59), sentAt(60), sentAt(199), sentAt(200)], [[], [2], [], [0, 1]]);
});

test("only the oldest part is sent in copies", () => {
  const { push, sentAt } = createLone();
  push(2);
  assert.deepEqual([sentAt(200), sentAt(400)], [[0, 1], [0, 0, 1]]);
});

test("a part is lost if one sent a quarter of the round trip later has arrived, not if it was sent sooner", () => {
  for (const laterMs of [25, 26]) {
    const { push, ack, sentAt } = createLone();
    push(1);
    push(1, laterMs);
    ack(0, { 1: 1 });
    assert.deepEqual(sentAt(laterMs), laterMs > 25 ? [0] : []);
  }
});

test("the round trip is measured on parts that were sent once, over the way that they went", () => {
  const { push, ack, relay, io, sentAt } = createLone({ srtt: null, rttvar: 0 }), other = newWay("direct");
  push(1);
  io.now = 50;
  ack(1, { 0: 2 }, { via: other });
  assert.deepEqual([relay.rtt.srtt, other.rtt.srtt], [null, null], "by another way");
  push(1);
  io.now = 130;
  ack(2);
  assert.equal(relay.rtt.srtt, 80);
  push(1);
  assert.deepEqual(sentAt(1_000), [2]);
  ack(3);
  assert.equal(relay.rtt.srtt, 80, "it was sent twice");
});

test("the window opens by a quarter of what arrives, up to 64, and closes by half down to 4", () => {
  const { delivery, frames, ack, sentAt, io } = createLone();
  delivery.push(new Uint8Array(MAX_MESSAGE_BYTES));
  assert.equal(frames.length, 16, "at first");
  ack(16);
  assert.equal(sentAt(10).length, 16 + 4);
  ack(36);
  assert.equal(sentAt(20).length, 20 + 5);
  ack(36 + 25);
  delivery.failAll("offline");
  for (let at = 30; at < 40; at++) { // many messages that arrive at once
    delivery.push(new Uint8Array(MAX_MESSAGE_BYTES));
    const all = frames.at(-1)!.base + 82;
    for (let i = 0; i < 4; i++) {
      ack(Math.min(all, Math.max(...frames.map(({ seq }) => seq)) + 1));
      sentAt(at);
    }
    delivery.failAll("offline");
  }
  frames.length = 0;
  delivery.push(new Uint8Array(MAX_MESSAGE_BYTES));
  assert.equal(frames.length, 64, "at most");
  for (let i = 0; i < 8; i++) {
    io.now = delivery.wakeAt();
    delivery.wake();
    assert.ok(delivery.wakeAt() > io.now);
  }
  delivery.failAll("timeout");
  frames.length = 0;
  delivery.push(new Uint8Array(MAX_MESSAGE_BYTES));
  assert.equal(frames.length, 4, "at least");
});

test("no part leaves that lies 64 or more ahead of one that is missing", () => {
  const { delivery, frames, ack, sentAt } = createLone();
  delivery.push(new Uint8Array(MAX_MESSAGE_BYTES));
  const arrived: Record<number, number> = {};
  for (let i = 0; i < 20; i++) {
    for (const { seq } of frames) if (seq > 0) arrived[seq] = 1;
    ack(0, arrived);
    sentAt(1);
  }
  sentAt(1_000);
  assert.equal(Math.max(...Object.keys(arrived).map(Number)), 63);
});

test("without a session nothing is sent, and one is asked for; without messages none is asked for", () => {
  const { delivery, frames, calls, push, sentAt, io } = createLone();
  delivery.wake();
  assert.deepEqual(calls, { needSession: 0, talk: 0, progress: 0 });
  io.hasSession = false;
  push(1);
  assert.deepEqual([frames, calls], [[], { needSession: 1, talk: 1, progress: 0 }]);
  assert.equal(delivery.wakeAt(), GIVE_UP_MS, "nothing is due but the end of the patience");
  io.hasSession = true;
  assert.deepEqual(sentAt(1_000), [0]);
  io.hasSession = false;
  assert.equal(delivery.wakeAt(), GIVE_UP_MS);
  assert.deepEqual(sentAt(2_000), []);
  io.hasSession = true;
  assert.deepEqual([sentAt(2_001), delivery.triesOfOldest()], [[0], 2]);
});

test("what falls due without a session does not close the window", () => {
  const { delivery, frames, sentAt, io } = createLone();
  delivery.push(new Uint8Array(MAX_MESSAGE_BYTES));
  io.hasSession = false;
  for (let at = 1_000; at < 5_000; at += 1_000) sentAt(at);
  delivery.failAll("offline");
  io.hasSession = true;
  frames.length = 0;
  delivery.push(new Uint8Array(MAX_MESSAGE_BYTES));
  assert.equal(frames.length, 16);
});

test("resend() takes what was sent before some time and has not arrived; resendInFlight() all of it, at once", () => {
  const { delivery, frames, push, ack, sentAt } = createLone();
  push(2);
  push(1, 10);
  ack(0, { 1: 1 });
  frames.length = 0;
  delivery.resend(10);
  assert.deepEqual(frames.map(({ seq }) => seq), [0]);
  assert.deepEqual(sentAt(11), []);
  delivery.resendInFlight();
  assert.deepEqual(frames.map(({ seq }) => seq), [0, 0, 2], "the oldest one in copies");
  frames.length = 0;
  delivery.resend(Infinity);
  assert.deepEqual(frames.map(({ seq }) => seq), [0, 0, 0, 2]);
});

test("a handshake takes the oldest part along: that is due again when the handshake is over, and not before", () => {
  const { delivery, frames, push, sentAt, io } = createLone();
  assert.equal(delivery.oldestPart(), null);
  delivery.onHandshake(); // takes nothing along
  io.hasSession = false;
  push(3);
  assert.deepEqual(delivery.oldestPart(), { type: "P2PMESSAGE", seq: 0, base: 0, left: 0, part: new Uint8Array(1) });
  delivery.onHandshake();
  io.hasSession = true;
  assert.deepEqual(sentAt(10), [1, 2]);
  frames.length = 0;
  delivery.resend(5);
  assert.deepEqual(frames, []);
  delivery.onHandshakeOver(60);
  assert.deepEqual([delivery.wakeAt(), sentAt(60), sentAt(209), sentAt(210)], [60, [0], [], [1, 2]]);
});

test("a new run of the peer gets after a time-out what only the former one has had, and nothing else", () => {
  const { delivery, ack, sentAt, told, io } = createLone();
  delivery.push(new Uint8Array(4_000)); // five parts of one message
  io.now = 100;
  ack(4); // four of them have arrived: nothing can be told yet
  ack(0, { 1: 1 }); // the new run has the second one, and that only
  assert.deepEqual([sentAt(200), sentAt(299), sentAt(300), told], [[4], [], [0, 2, 3], []]);
});

test("a message that fails lets the next one go on at once, with 15 s of its own", () => {
  const { delivery, told, push, ack, frames, io } = createLone();
  push(1);
  push(1, 1_000);
  io.now = 1_100;
  ack(0, { 1: 1 }); // the second one has arrived, behind a gap
  io.now = 1_100 + GIVE_UP_MS - 1;
  delivery.giveUp(() => "timeout");
  assert.deepEqual(told, []);
  io.now++;
  frames.length = 0;
  delivery.giveUp(() => "timeout");
  delivery.wake();
  const outcome = { event: "sent", to: "peer", ok: false, path: "relay" };
  assert.deepEqual(told, [{ ...outcome, id: "00000000-0", ms: 16_100, reason: "timeout" }]);
  assert.deepEqual(frames[0], { seq: 1, base: 1, at: 16_100, isLate: true });
  io.now += GIVE_UP_MS - 1;
  delivery.giveUp(() => "timeout");
  assert.equal(told.length, 1);
  delivery.failAll("offline");
  assert.deepEqual(told[1], { ...outcome, id: "00000000-1", ms: 30_099, reason: "offline" });
  assert.ok(delivery.isIdle());
});
