/**
 * Debian's three STUN clients, which know nothing of us, and a socket of our own ask the real server.
 *
 * @module
 */
import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import dgram from "node:dgram";
import { accessSync, constants } from "node:fs";
import { delimiter, join } from "node:path";
import process from "node:process";
import { test } from "node:test";
import { decodeStun, encodeStunRequest, type Stun, STUN_COOKIE } from "../../protocol.ts";
import { start } from "../programs.ts";

const TRANSACTION = `${STUN_COOKIE}0102030405060708090a0b0c`;
/** For an answer, or a tool, that must come to an end. */
const PATIENCE_MS = 60_000;

const isLinux = process.platform === "linux"; // only there all of 127.0.0.0/8 is this host

/** Ports of 127.0.0.1 that were free a moment ago. */
async function freePorts(count: number): Promise<number[]> {
  const sockets = Array.from({ length: count }, () => dgram.createSocket("udp4"));
  await Promise.all(sockets.map((socket) => new Promise<void>((bound) => socket.bind(0, "127.0.0.1", bound))));
  const ports = sockets.map((socket) => socket.address().port);
  for (const socket of sockets) socket.close();
  return ports;
}

/** What a tool says on stdout and stderr until it ends; an error if it does not. */
function run(tool: string, ...args: string[]): Promise<string> {
  const child = spawn(tool, args, { stdio: ["ignore", "pipe", "pipe"] });
  let said = "";
  return new Promise<string>((resolve, reject) => {
    const timer = setTimeout(() => child.kill("SIGKILL"), PATIENCE_MS);
    for (const stream of [child.stdout, child.stderr]) stream.setEncoding("utf8").on("data", (text) => said += text);
    child.on("error", reject);
    child.on("close", (_code, signal) => {
      clearTimeout(timer);
      if (signal !== "SIGKILL") resolve(said);
      else reject(new Error(`${tool} did not end in ${PATIENCE_MS} ms\n${said}`));
    });
  });
}

/** A real server on 127.0.0.1, with 127.0.0.2 as its second address if wanted; it ends with the case. */
async function withServer(second: boolean, play: (ports: number[]) => Promise<void>): Promise<void> {
  const [port, altPort] = second ? await freePorts(2) : [0, 0];
  const args = ["--host", "127.0.0.1", "--port", `${port}`, "--alt-port", `${altPort}`, "--json"];
  const server = start("server", second ? [...args, "--alt-host", "127.0.0.2"] : args);
  try {
    const listening = await server.until({ event: "listening" });
    await play([Number(listening["port"]), Number(listening["altPort"])]);
  } finally {
    server.signal("SIGTERM");
    await server.ended;
  }
}

test("server on real sockets answers from a third port", async () => {
  await withServer(false, async ([port, altPort]) => {
    const socket = dgram.createSocket("udp4");
    const query = (to: number, change: { changePort?: boolean }) =>
      new Promise<{ from: number; stun: Stun | null }>((resolve, reject) => {
        const timer = setTimeout(() => reject(new Error("No answer")), PATIENCE_MS);
        socket.once("message", (data, { port: from }) => {
          clearTimeout(timer);
          resolve({ from, stun: decodeStun(data) });
        });
        socket.send(encodeStunRequest({ transaction: TRANSACTION, ...change }), to, "127.0.0.1");
      });
    await new Promise<void>((bound) => socket.bind(0, "127.0.0.1", bound));
    const mapped = `127.0.0.1:${socket.address().port}`;
    try {
      const third = await query(port!, { changePort: true });
      assert.ok(third.from !== port && third.from !== altPort);
      for (const to of [port!, altPort!]) {
        const { from, stun } = await query(to, {});
        assert.deepEqual([from, stun?.kind, stun?.mapped], [to, "response", mapped]);
        assert.equal((await query(to, { changePort: true })).from, third.from);
      }
    } finally {
      socket.close();
    }
  });
});

test("--alt-host without two addresses and two ports to choose from is a usage error", async () => {
  const wrong: [string[], RegExp][] = [
    [["--alt-host", "127.0.0.2"], /--host/],
    [["--host", "0.0.0.0", "--alt-host", "127.0.0.2"], /--host/],
    [["--host", "::1", "--alt-host", "127.0.0.2"], /--host/],
    [["--host", "127.0.0.1", "--alt-host", "localhost"], /--alt-host.*localhost/],
    [["--host", "127.0.0.1", "--alt-host", "0.0.0.0"], /--alt-host.*0\.0\.0\.0/],
    [["--host", "127.0.0.1", "--alt-host", "127.0.0.2", "--port", "0"], /--port/],
  ];
  await Promise.all(wrong.map(async ([args, complaint]) => {
    const server = start("server", args);
    assert.equal(await server.ended, 2, server.evidence());
    assert.match(server.stderr(), complaint);
  }));
});

// -- Debian's clients, which know nothing of us

const isHere = (tool: string) =>
  (process.env["PATH"] ?? "").split(delimiter).some((directory) => {
    try {
      accessSync(join(directory, tool), constants.X_OK);
      return true;
    } catch {
      return false;
    }
  });

function toolTest(name: string, { tool, from }: { tool: string; from: string }, play: () => Promise<void>): void {
  const reason = !isLinux ? "needs Linux" : isHere(tool) ? null : `not installed, apt-get install ${from}`;
  test(reason ? `${name} (skipped: ${reason})` : name, { skip: reason ?? false }, play);
}

toolTest("turnutils_stunclient learns its endpoint", { tool: "turnutils_stunclient", from: "coturn" }, async () => {
  for (const second of [false, true]) {
    await withServer(second, async (ports) => {
      for (const port of ports) {
        const output = await run("turnutils_stunclient", "-p", `${port}`, "127.0.0.1");
        // At two addresses it also asks for an answer to another port of its own, and with a request of 1,532 bytes.
        assert.match(output, /UDP reflexive addr: 127\.0\.0\.1:\d+/);
        assert.equal(output.includes("RFC 5780 response 3"), second, output);
      }
    });
  }
});

toolTest("turnutils_natdiscovery finds no NAT", { tool: "turnutils_natdiscovery", from: "coturn" }, async () => {
  await withServer(true, async ([port, altPort]) => {
    const output = await run("turnutils_natdiscovery", "-m", "-f", "-p", `${port}`, "127.0.0.1");
    assert.match(output, /NAT with Endpoint Independent Mapping!/);
    assert.match(output, /NAT with Endpoint Independent Filtering!/);
    for (const origin of [`127.0.0.1:${port}`, `127.0.0.2:${port}`, `127.0.0.2:${altPort}`]) {
      assert.ok(output.includes(`Response origin: : ${origin}`), output);
    }
    assert.ok(output.includes(`Other addr: : 127.0.0.2:${altPort}`), output);
  });
});

toolTest(
  "turnutils_natdiscovery tolerates one address",
  { tool: "turnutils_natdiscovery", from: "coturn" },
  async () => {
    await withServer(false, async ([port]) => {
      const output = await run("turnutils_natdiscovery", "-m", "-f", "-p", `${port}`, "127.0.0.1");
      assert.match(output, /UDP reflexive addr: 127\.0\.0\.1:\d+/);
      assert.doesNotMatch(output, /Independent|Dependent|Other addr/, "it draws no conclusion");
    });
  },
);

toolTest("stun, a classic client, finds the internet open", { tool: "stun", from: "stun-client" }, async () => {
  await withServer(true, async ([port, altPort]) => {
    const output = await run("stun", `127.0.0.1:${port}`, "-v");
    assert.match(output, /Primary: Open/);
    for (const source of [`127.0.0.1:${port}`, `127.0.0.2:${port}`]) {
      assert.ok(output.includes(`SourceAddress = ${source}`), output);
    }
    assert.ok(output.includes(`ChangedAddress = 127.0.0.2:${altPort}`), output);
    assert.match(output, /test I = 1\ntest II = 1\ntest III = 1\ntest I\(2\) = 1\n/);
  });
});

toolTest("stun, a classic client, at a server with one address", { tool: "stun", from: "stun-client" }, async () => {
  await withServer(false, async ([port]) => {
    const output = await run("stun", `127.0.0.1:${port}`, "-v");
    assert.match(output, /MappedAddress = 127\.0\.0\.1:\d+/);
    assert.match(output, /test I = 1\ntest II = 0\ntest III = 1\n/); // the third port answers, no other address does
  });
});
