/**
 * Two machines on real sockets, of which one has a bug: what `listen` makes of that is printed after a second, as JSON.
 * Run by fault_test.ts, as a process of its own, since an exception that nobody catches ends it.
 *
 *     deno run -A --unstable-net lab/faulty.ts wake|opened|receive|event|always|wakeAt
 *
 * @module
 */
import process from "node:process";
import { clock, type Effect, formatEndpoint, listen, type Machine } from "../protocol.ts";

const [where = "wake"] = process.argv.slice(2), TICK_MS = 20, RUN_MS = 1_000;
const LOOPBACK = { host: "127.0.0.1", port: 0 };
const BYTES = new Uint8Array(10);
/** Joined, so that the excerpt of the source that a runtime shows does not have it. */
const MESSAGE = ["a", "fault", "of", "ours"].join("-");

/** What has happened; the third time, or each time, `fails` throws. */
const newCount = () => ({ wakes: 0, received: 0, opened: 0, events: 0, sent: 0 });
let faults = 0;
function fails(here: string, times: number): void {
  if (where !== "always" ? here !== where || times !== 3 : here !== "wake") return;
  faults++;
  throw new Error(MESSAGE);
}

/** Wakes every 20 ms; then it tells an event, sends to `to`, and opens a socket. */
function ticker(count: ReturnType<typeof newCount>, to: () => string, isSick: boolean): Machine<number> {
  let nextAt = clock(), asked = 0;
  return {
    opened(socket) {
      if (socket === 0) return [];
      count.opened++;
      if (isSick) fails("opened", count.opened);
      return [{ kind: "close", socket }];
    },
    receive() {
      count.received++;
      if (isSick) fails("receive", count.received);
      return [];
    },
    wake(now) {
      count.wakes++;
      if (isSick) fails("wake", count.wakes);
      nextAt = now + TICK_MS;
      const effects: Effect<number>[] = [{ kind: "event", event: count.wakes }];
      if (to() !== "") effects.push({ kind: "send", socket: 0, to: to(), data: BYTES });
      if (asked < 10) effects.push({ kind: "open", socket: ++asked });
      return effects;
    },
    wakeAt() {
      if (isSick && where === "wakeAt" && count.wakes === 3 && faults === 0) fails("wakeAt", 3);
      return nextAt;
    },
  };
}

const sick = newCount(), well = newCount();
let sickAt = "", wellAt = "";
const running = await listen(ticker(sick, () => wellAt, true), {
  sockets: [LOOPBACK],
  onEvent() {
    sick.events++;
    fails("event", sick.events);
  },
});
const other = await listen(ticker(well, () => sickAt, false), { sockets: [LOOPBACK], onEvent: () => well.events++ });
sickAt = formatEndpoint(LOOPBACK.host, running.ports[0]!);
wellAt = formatEndpoint(LOOPBACK.host, other.ports[0]!);
setTimeout(() => {
  running.close();
  other.close();
  console.log(JSON.stringify({ faults, sick, well }));
}, RUN_MS);
