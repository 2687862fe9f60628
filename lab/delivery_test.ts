/**
 * The room `delivery` of client.ts alone: two of them over a `carry` that loses, doubles and delays, without keys, NATs
 * and servers. Each message is shown once, whole and in order, or told as failed.
 *
 * @module
 */
import assert from "node:assert/strict";
import { test } from "node:test";
import { type ClientEvent, createDelivery, MAX_MESSAGE_BYTES } from "../client.ts";
import type { Peer } from "../protocol.ts";
import { random } from "./network.ts";

type Delivery = ReturnType<typeof createDelivery>;
type Way = Parameters<Delivery["onAck"]>[1];
type Options = { loss: number; delayMs: number; sessionAfterMs: number; switchMs: number };

interface End {
  delivery: Delivery;
  stream: string;
  shown: string[];
  outcomes: Extract<ClientEvent, { event: "sent" }>[];
  relay: Way;
  path: Way;
  other: End | null;
  cast(frame: Peer, over: Way): void;
}

const encoder = new TextEncoder();

/** Two ends of a conversation under virtual time. */
function line(seed: string, { loss, delayMs, sessionAfterMs, switchMs }: Options) {
  const next = random(`delivery ${seed}`);
  const io = { now: 1_700_000_000_000 };
  const start = io.now, timers: { at: number; work: () => void }[] = [];
  const later = (ms: number, work: () => void) => void timers.push({ at: io.now + ms, work });
  const inSession = () => io.now >= start + sessionAfterMs && io.now >= lostUntil;
  let lostUntil = 0, blackUntil = 0;

  function createEnd(name: string, run: number): End {
    const shown: string[] = [],
      outcomes: End["outcomes"] = [],
      stream = `${name}${run}`.padEnd(16, "0");
    const rtt = () => ({ srtt: null, rttvar: 0 });
    const relay: Way = { kind: "relay", rtt: rtt() }, path = { kind: "direct", rtt: rtt() } as Way;
    const way = () => Math.floor((io.now - start) / switchMs) % 2 > 0 ? path : relay;
    const emit = (event: ClientEvent) => {
      if (event.event === "message") shown.push(event.text);
      if (event.event === "sent") outcomes.push(event);
    };
    const delivery: Delivery = createDelivery(
      {
        get now() {
          return io.now;
        },
        emit,
      } as Parameters<typeof createDelivery>[0],
      { name, relay, way, hasSession: inSession },
      stream,
      {
        carry(frame, isLate) {
          if (!inSession()) return null;
          for (const over of isLate && way() === path ? [path, relay] : [way()]) cast(frame, over);
          return way();
        },
        needSession: () => {},
        talk: () => {},
        progress: () => {},
      },
    );
    const end: End = { delivery, stream, shown, outcomes, relay, path, other: null, cast };

    /** To whoever is at the other end when it arrives; perhaps twice, perhaps never. */
    function cast(frame: Peer, over: Way): void {
      for (let copies = next() < 0.1 ? 2 : 1; copies > 0; copies--) {
        if (next() < loss || io.now < blackUntil) continue;
        later(delayMs * (1 + 2 * next()), () => receive(end.other!, frame, over.kind));
      }
    }
    function receive(at: End, frame: Peer, kind: Way["kind"]): void {
      if (!inSession() || (end !== alice && end !== bob())) return; // of a former run: the next one logs in first
      at.delivery.openStream(stream);
      const back = (ack: Peer) => inSession() && (at.cast(ack, kind === "relay" ? at.relay : at.path), true);
      if (frame.type === "P2PMESSAGE") at.delivery.onPart(frame, { kind, stream, back });
      if (frame.type === "P2PMESSAGEACK") at.delivery.onAck(frame, kind === "relay" ? at.relay : at.path);
      at.delivery.wake();
    }
    return end;
  }

  const alice = createEnd("alice", 1), bobs = [createEnd("bob", 1)];
  const bob = () => bobs.at(-1)!;
  const meet = () => {
    alice.other = bob();
    for (const one of bobs) one.other = alice;
  };
  meet();
  return {
    ...{ io, alice, bobs, bob, next, later },
    restart(): void {
      bobs.push(createEnd("bob", bobs.length + 1));
      lostUntil = io.now + 300 * next(); // until there are new keys
      meet();
      later(lostUntil - io.now, () => { // whoever opens a session, or answers, says what it has
        for (const [end, other] of [[alice, bob()], [bob(), alice]] as const) {
          end.delivery.openStream(other.stream);
          end.delivery.acknowledge((ack) => (end.cast(ack, end.relay), true));
        }
      });
    },
    blackout: (ms: number) => void (blackUntil = io.now + ms),
    run(until: () => boolean, limitMs: number): void {
      for (const end = io.now + limitMs; !until() && io.now < end;) {
        const ends = [alice, bob()];
        const due = Math.min(end, ...timers.map(({ at }) => at), ...ends.map(({ delivery }) => delivery.wakeAt()));
        io.now = Math.max(io.now, due);
        for (const timer of timers.filter(({ at }) => at <= io.now)) {
          timers.splice(timers.indexOf(timer), 1);
          timer.work();
        }
        for (const { delivery } of ends) {
          delivery.giveUp(() => "timeout");
          delivery.wake();
          assert.ok(delivery.wakeAt() > io.now, `wakeAt ${delivery.wakeAt() - io.now} ms after wake`);
        }
        if (timers.length === 0 && due === end) break;
        if (!inSession()) later(50, () => {}); // the session comes without being asked for
      }
    },
  };
}

/** Those of `texts` that have been shown, in the order of sending, none of them twice. */
const inOrder = (shown: string[], texts: string[]) =>
  shown.every((text, i) => i === 0 || texts.indexOf(text) > texts.indexOf(shown[i - 1]!));

test("500 lossy lines show each message once, whole and in order, both ways", () => {
  for (let seed = 0; seed < 500; seed++) {
    const dice = random(`options ${seed}`);
    const options = {
      loss: 0.3 * dice(),
      delayMs: 100 * dice(),
      sessionAfterMs: 2_000 * dice(),
      switchMs: 200 + 3_000 * dice(),
    };
    const { alice, bob, run, later, next } = line(`${seed}`, options);
    const texts = { alice: [] as string[], bob: [] as string[] };
    for (let i = 0; i < 6; i++) {
      const length = seed % 25 === 0 && i === 3 ? MAX_MESSAGE_BYTES : Math.ceil(3_000 * next() ** 3);
      const text = (who: string) => `${who} ${i} `.padEnd(length, "x");
      later(2_000 * next(), () => {
        for (const [end, who] of [[alice, "alice"], [bob(), "bob"]] as const) {
          texts[who].push(text(who));
          end.delivery.push(encoder.encode(text(who)));
        }
      });
    }
    run(() => alice.outcomes.length + bob().outcomes.length === 12, 120_000);
    const where = `seed ${seed}, ${JSON.stringify(options)}`;
    assert.ok([...alice.outcomes, ...bob().outcomes].every(({ ok }) => ok), where);
    assert.deepEqual([bob().shown, alice.shown], [texts.alice, texts.bob], where);
    assert.ok(alice.delivery.isIdle() && bob().delivery.isIdle(), where);
  }
});

test("when the peer is started again, or nothing passes for long, a message is shown in order or told as failed", () => {
  for (let seed = 0; seed < 300; seed++) {
    const dice = random(`breaks ${seed}`);
    const world = line(`breaks ${seed}`, {
      loss: 0.2 * dice(),
      delayMs: 60 * dice(),
      sessionAfterMs: 0,
      switchMs: 1_000,
    });
    const { alice, bobs, run, later, next } = world, texts: string[] = [];
    for (let i = 0; i < 12; i++) {
      later(6_000 * next(), () => {
        texts.push(`${texts.length} `.padEnd(Math.ceil(5_000 * next() ** 2), "x"));
        alice.delivery.push(encoder.encode(texts.at(-1)!));
      });
    }
    const isLong = seed % 3 === 0; // a blackout that outlasts the 15 s
    later(
      4_000 * next(),
      () => seed % 2 === 0 ? world.blackout(isLong ? 16_000 + 4_000 * next() : 5_000) : world.restart(),
    );
    if (seed % 5 === 0) later(5_000 * next(), world.restart);
    run(() => alice.outcomes.length === 12 && texts.length === 12, 120_000);
    const delivered = texts.filter((_, i) => alice.outcomes.some(({ id, ok }) => ok && id === alice.outcomes[i]?.id));
    assert.equal(new Set(alice.outcomes.map(({ id }) => id)).size, 12, `seed ${seed}: one outcome each`);
    assert.ok(bobs.every(({ shown }) => inOrder(shown, texts)), `seed ${seed}: ${bobs.map(({ shown }) => shown)}`);
    const shown = bobs.flatMap(({ shown }) => shown);
    assert.ok(delivered.length <= shown.length, `seed ${seed}: what is told as sent has been shown`);
    if (!isLong || seed % 2 > 0) assert.ok(alice.outcomes.every(({ ok }) => ok), `seed ${seed}: nothing is given up`);
  }
});
