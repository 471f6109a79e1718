/**
 * What the processes of one server say to each other about its cluster. A worker and the keeper (cluster.ts) speak through
 * the supervisor, which starts the keeper when it is wanted.
 */
import type { ErrorCode } from "./protocol.ts";

/** How the keeper is told what to keep: as JSON in the environment variable REPRISE_KEEPER. */
export interface KeeperSettings {
  root: string;
  host: string;
  port: number;
  tls: boolean;
  /** `host:port` of the server to join. */
  join?: string | undefined;
  /** `host:port` that clients are told; made of `host` and `port` if not given. */
  advertise?: string | undefined;
  /** For the server to join. */
  token?: string | undefined;
  ca?: string | undefined;
  keepFree: number;
  log: "pretty" | "json";
}

/** A member, as `status` shows it. */
export interface MemberStatus {
  node: string;
  /** `host:port`, as clients are told. */
  address: string;
  /** Clients are sent to live ones only; one that is joining does not have all of the tree yet. */
  state: "live" | "joining" | "gone";
  revision: number;
  /** Revisions behind. */
  lag: number;
  problem?: string | undefined;
}

/** What the keeper has told everyone last. */
export interface ClusterState {
  role: "alone" | "master" | "replica";
  node: string;
  /** `host:port` of the server that was joined. */
  master?: string | undefined;
  revision: number;
  /** What keeps this member behind. */
  problem?: string | undefined;
  /** The members that have joined this one; clients are sent to the live ones in turn. */
  replicas: MemberStatus[];
  /** Tokens by which members know each other; like one with the access `replica`, of the whole root. */
  secrets: string[];
  /** Where to ask for what a member has made and is not here yet: `host:port` by the member's node; "" for all others. */
  holders: { [node: string]: string };
}

/** From a worker to the keeper; an `id` is one of the worker's own. */
export type ToKeeper =
  /** Clients have changed these paths; answered when the ledger knows, and every live member. */
  | { kind: "announce"; id: number; paths: string[] }
  /** A server that may do so begins a link with that message, goes on, or has ended it. */
  | { kind: "linked"; id: number; peer: string; message: object }
  | { kind: "said"; id: number; message: object }
  | { kind: "unlinked"; id: number };

/** From the keeper to one worker. */
export type ToWorker =
  | { kind: "announced"; id: number }
  | { kind: "say"; id: number; message: object }
  /** Ends a link, with what is wrong. */
  | { kind: "unlink"; id: number; code: ErrorCode; text: string };

/** From the keeper to the supervisor: `worker` is a worker's number, 0 stands for everyone. */
export type FromKeeper = { worker: number; message: ToWorker } | { worker: 0; cluster: ClusterState };
/** And back. A worker that has ended has ended its links. */
export type ForKeeper = { worker: number; message: ToKeeper } | { worker: number; ended: true };
