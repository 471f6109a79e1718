/** A member that is cut off from the others, wholly or in one direction, while both sides go on: see namespaces.ts. */
import { expect, setDefaultTimeout, test } from "bun:test";
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import type { ClusterState } from "../../hub.ts";
import { addToken } from "../../tokens.ts";
import { authority, hasOpenssl, pair } from "../certificates.ts";
import {
  ifStill,
  runClient,
  type Server,
  startServer,
  TEST_MS,
  temporaryFolder,
  treeOf,
  waitFor,
} from "../fixtures.ts";
import { type Machine, makeNetwork, whyNoNetwork } from "./namespaces.ts";

setDefaultTimeout(2 * TEST_MS);

const PORT = 2121;
/** Sent to one that is cut off, a client is soon to ask another. */
const SOON = ["--timeout", "3"];
const noNetwork = hasOpenssl ? whyNoNetwork() : "openssl is not installed";
if (noNetwork) console.log(`skipped: the tests of a cluster that is cut apart: ${noNetwork}`);

interface Node {
  machine: Machine;
  root: string;
  server: Server;
  client(...args: string[]): ReturnType<typeof runClient>;
  put(name: string, content: string, limits?: string[]): ReturnType<typeof runClient>;
  status(): Promise<ClusterState>;
}

interface Cluster extends AsyncDisposable {
  nodes: [Node, Node, Node];
}

/** A master and two members on machines of their own, with TLS, and tokens for joining and for writing. */
async function startApart(): Promise<Cluster> {
  const folder = temporaryFolder();
  const network = makeNetwork(3);
  const nodes: Node[] = [];
  const dispose = async () => {
    for (const { machine } of nodes) machine.heal();
    await Promise.all(nodes.map(({ server }) => server[Symbol.asyncDispose]()));
    network[Symbol.dispose]();
    folder[Symbol.dispose]();
  };
  const tokens = join(folder.path, "tokens.json");
  const tokenFile = join(folder.path, "token");
  writeFileSync(tokenFile, addToken(tokens, { name: "member", access: "replica", folder: "" }), { mode: 0o600 });
  const env = {
    REPRISE_TOKEN: addToken(tokens, { name: "writer", access: "write", folder: "" }),
    REPRISE_CA: authority(),
  };
  const [master] = network.machines;
  const join1 = ["--join", `tls://${master!.address}:${PORT}`, "--token-file", tokenFile];
  const access = ["--writable", "--tokens", tokens, "--ca", authority(), ...pair("machines").args];
  try {
    for (const machine of network.machines) {
      const root = temporaryFolder(folder.path).path;
      const args = ["--host", machine.address, ...access, ...(machine === master ? [] : join1)];
      const server = await startServer(root, { args, port: PORT, runBy: machine.runBy });
      nodes.push(nodeOf(machine, root, server, folder.path, env));
    }
    await live(nodes[0]!, 2);
  } catch (error) {
    await dispose();
    throw error;
  }
  return { nodes: nodes as [Node, Node, Node], [Symbol.asyncDispose]: dispose };
}

function nodeOf(machine: Machine, root: string, server: Server, cwd: string, env: Record<string, string>): Node {
  const client = (...args: string[]) =>
    runClient(server.address, [...args, ...SOON], { cwd, env, runBy: machine.runBy });
  return {
    machine,
    root,
    server,
    client,
    put: (name, content, limits = []) =>
      runClient(server.address, ["put", "-", "-t", name, ...limits], {
        cwd,
        env,
        runBy: machine.runBy,
        stdin: content,
      }),
    status: async () =>
      JSON.parse(
        (await client("status", "--json", "--retries", "0")).output || '{"problem":"no answer","replicas":[]}',
      ),
  };
}

async function live(master: Node, count: number): Promise<void> {
  await waitFor(`${count} are live`, async () => {
    const { replicas = [] } = await master.status();
    return replicas.filter(({ state }) => state === "live").length === count;
  });
}

async function settled(nodes: Node[]): Promise<string[]> {
  await live(nodes[0]!, nodes.length - 1);
  const tree = () => ifStill(() => treeOf(nodes[0]!.root));
  await waitFor("all have the same", async () => {
    const statuses = await Promise.all(nodes.map(({ status }) => status()));
    const isBehind = statuses.some(
      ({ problem, replicas }) => problem !== undefined || replicas.some(({ lag }) => lag > 0),
    );
    const first = tree();
    return (
      !isBehind &&
      first &&
      nodes.every(({ root }) =>
        Bun.deepEquals(
          ifStill(() => treeOf(root)),
          first,
        ),
      )
    );
  });
  return treeOf(nodes[0]!.root);
}

/** Both sides take changes while they do not hear of each other; then all have all of them. */
async function goesOn(
  cluster: Cluster,
  apart: (machine: Machine) => void,
  round: string,
  isWhole: boolean,
): Promise<void> {
  const [master, other, lost] = cluster.nodes;
  expect(await other.put(`${round}-both`, "before")).toMatchObject({ status: 0, errors: "" });
  await settled(cluster.nodes);
  apart(lost.machine);
  // Each is acknowledged once the other side is known to be gone.
  const answers = await Promise.all([
    other.put(`${round}-here`, "of the master's side", SOON),
    lost.put(`${round}-there`, "of the one that is cut off", SOON),
    other.put(`${round}-both`, "of the master's side", SOON),
    lost.put(`${round}-both`, "of the one that is cut off", SOON),
  ]);
  for (const answer of answers) expect(answer).toMatchObject({ status: 0 });
  await live(master, 1);
  await waitFor("the other knows, too", async () => (await lost.status()).problem !== undefined);
  lost.machine.heal();
  const tree = await settled(cluster.nodes);
  const names = tree.map((line) => line.split(" ")[0]!).filter((name) => name.startsWith(round));
  const copies = names.filter((name) => name.includes(".conflict-"));
  // Who hears of the other's change before its own is made makes it on that one: then there is no conflict.
  if (isWhole || copies.length > 0) expect(copies).toHaveLength(1);
  expect(names).toEqual(expect.arrayContaining([`${round}-here`, `${round}-there`, `${round}-both`]));
  const contents = await Promise.all(
    [`${round}-both`, ...copies].map(async (name) => (await master.client("cat", name)).output),
  );
  const both = ["of the master's side", "of the one that is cut off"];
  if (copies.length > 0) expect(contents.sort()).toEqual(both);
  else expect(both).toContain(contents[0]!);
}

test.skipIf(noNetwork !== undefined)("a member is cut off for longer than its lease, and comes back", async () => {
  await using cluster = await startApart();
  await goesOn(cluster, (machine) => machine.cut(), "cut", true);
  for (const { server } of cluster.nodes) expect(server.stderr()).not.toContain('"event":"bug"');
});

test.skipIf(noNetwork !== undefined)(
  "a member that hears and is not heard, and one that is heard and does not hear",
  async () => {
    await using cluster = await startApart();
    for (const direction of ["input", "output"] as const) {
      const apart = (machine: Machine) => (machine.deafen ? machine.deafen(direction) : machine.cut());
      await goesOn(cluster, apart, direction, false);
    }
    for (const { server } of cluster.nodes) expect(server.stderr()).not.toContain('"event":"bug"');
  },
);
